# Boots a real systemd on a throw-away copy of this machine's file system, in namespaces of its own but in
# the network namespace of the caller. Arguments: an empty directory, the mmproxyctl to install, the
# repository. Starts nothing by itself but the journal; the caller enables the rest with systemctl.
set -eu
lab=$1 program=$2 repository=$3

if [ "${4-}" != inside ]; then
    # a cgroup of its own first: systemd takes over the one that it finds itself in
    cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    own=$(sed -n 's/^0:://p' /proc/self/cgroup)
    cgroup=${cgroup%/}/${own#/}
    cgroup=${cgroup%/}/mmproxyctl-test-$$
    mkdir "$cgroup"
    echo "$cgroup" >"$lab/cgroup"
    echo $$ >"$cgroup/cgroup.procs"
    exec unshare --mount --propagation private --uts --ipc --cgroup --pid --fork --kill-child \
        sh "$0" "$lab" "$program" "$repository" inside
fi

mount -t tmpfs lab "$lab"
mkdir "$lab/upper" "$lab/work" "$lab/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$lab/upper,workdir=$lab/work" "$lab/root"
cd "$lab/root"

# kernel-wide settings are read-only: not ours to change, and units for them see it and stay away
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=755 dev dev
for node in null zero full random urandom tty; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s /proc/self/fd dev/fd

# nothing of the machine's own is started, mounted or loaded
rm -rf etc/systemd/system etc/systemd/*.conf.d etc/modules-load.d etc/fstab etc/machine-id
for wants in usr/lib/systemd/system/*.wants lib/systemd/system/*.wants; do rm -rf "$wants"; done
mkdir -p etc/systemd/system etc/mmproxy
ln -s /lib/systemd/system/basic.target etc/systemd/system/default.target
mkdir etc/systemd/system/sockets.target.wants
for socket in systemd-journald systemd-journald-dev-log; do
    ln -s /lib/systemd/system/$socket.socket etc/systemd/system/sockets.target.wants/
done
echo lab >etc/hostname
: >etc/machine-id

install -m 755 "$program" usr/local/bin/mmproxyctl
install -m 644 "$repository"/systemd/*.service etc/systemd/system/
for file in pathways.conf instances.tsv allow.txt; do
    install -m 644 "$repository/config/$file.example" etc/mmproxy/$file
done

mkdir .old
pivot_root . .old
umount -l .old
exec env -i container=lab PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --log-target=journal --show-status=no
