//! Names of containers, of a real Podman in the test's own network namespace. Its image is made on the spot of
//! one static binary: nothing is pulled.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::Rig;
use crate::relay::lab::announce;
use crate::support::net::{Running, wait_for};

/// What podman is told beside its command, each path below one directory.
const SCRIPT: &str = r#"
set -e
cd "$1"
# a hierarchy of its own, in its own mount namespace: which version the host has is of no matter
umount -lR /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export CONTAINERS_CONF="$1/containers.conf"
podman() {
    command podman --root "$1/storage" --runroot "$1/runroot" --tmpdir "$1/tmp" --storage-driver vfs \
        --cgroup-manager cgroupfs --events-backend file --network-config-dir "$1/networks" --runtime crun "${@:2}"
}
if [ ! -e rootfs.tar ]; then
    mkdir -p rootfs/bin rootfs/proc rootfs/sys rootfs/dev rootfs/etc rootfs/tmp
    cp "$(command -v busybox)" rootfs/bin/busybox
    tar -C rootfs -cf rootfs.tar .
    podman "$1" import --quiet rootfs.tar localhost/busybox
    podman "$1" network create --subnet 10.89.5.0/24 --ipv6 --subnet fd89:5::/64 front
fi
touch ready
exec sleep infinity
"#;

const CONF: &str = r#"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
pids_limit = 0
cgroups = "disabled"
[network]
network_backend = "netavark"
"#;

struct Engine<'r> {
    rig: &'r Rig,
    directory: PathBuf,
    /// Whose mount namespace has the containers' network namespaces: they outlive the service.
    holder: Running,
    service: Option<Running>,
}

impl<'r> Engine<'r> {
    fn new(rig: &'r Rig) -> Self {
        let directory = rig.wks.dir().join("engine");
        rig.wks.write("engine/containers.conf", CONF);
        rig.wks.write("engine/engine.sh", SCRIPT);
        let mut command = rig.wks.command("unshare");
        command
            .args(["--mount", "--propagation", "private", "bash"])
            .arg(directory.join("engine.sh"))
            .arg(&directory);
        let mut engine = Self {
            rig,
            holder: rig.wks.spawn(command),
            directory,
            service: None,
        };
        engine.wait_until("ready to start", |engine| {
            engine.directory.join("ready").exists()
        });
        engine.start();
        engine
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !condition(self) {
            let service = self.service.as_ref().map(Running::log).unwrap_or_default();
            assert!(
                Instant::now() < end,
                "podman is not {what} (apt-get install podman):\n{}{service}",
                self.holder.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn socket(&self) -> String {
        format!("unix://{}/podman.sock", self.directory.display())
    }

    fn start(&mut self) {
        let mut command = self.rig.wks.command("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.holder.pid()))
            .args(["--", "podman"])
            .env("CONTAINERS_CONF", self.directory.join("containers.conf"));
        for (option, name) in [
            ("--root", "storage"),
            ("--runroot", "runroot"),
            ("--tmpdir", "tmp"),
            ("--network-config-dir", "networks"),
        ] {
            command.arg(option).arg(self.directory.join(name));
        }
        command
            .args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"])
            .args(["--events-backend", "file", "--runtime", "crun"])
            .args(["system", "service", "--time", "0", &self.socket()]);
        self.service = Some(self.rig.wks.spawn(command));
        self.wait_until("up", |engine| {
            UnixStream::connect(engine.directory.join("podman.sock")).is_ok()
        });
    }

    fn stop(&mut self) {
        self.service = None;
        let _ = std::fs::remove_file(self.directory.join("podman.sock"));
    }

    /// A command to the service.
    fn podman(&self, words: &str) -> String {
        let output = self
            .rig
            .wks
            .command("podman")
            .env("CONTAINERS_CONF", self.directory.join("containers.conf"))
            .arg("--url")
            .arg(self.socket())
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .expect("podman: install it (./tests/run.sh does)");
        assert!(output.status.success(), "podman {words}: {output:?}");
        let both = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&both).trim().to_owned()
    }

    fn address(&self) -> String {
        self.podman("inspect web --format {{.NetworkSettings.Networks.front.IPAddress}}")
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        // containers outlive the service
        if self.service.is_some() {
            let _ = self
                .rig
                .wks
                .command("podman")
                .env("CONTAINERS_CONF", self.directory.join("containers.conf"))
                .arg("--url")
                .arg(self.socket())
                .args(["rm", "--force", "--all", "--time", "0"])
                .output();
        }
    }
}

/// Asks the container's web server through the relay, and waits until it has logged this client.
fn asked(engine: &Engine<'_>, client: &str) {
    let mut stream = engine.rig.dial("10.0.0.1:8080");
    stream.write_all(&announce(client)).expect("send");
    stream
        .write_all(b"GET /nothing HTTP/1.0\r\n\r\n")
        .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1."), "{answer}");
    let client = client.replace(['[', ']'], "");
    let (ip, port) = client.rsplit_once(':').expect("a port");
    wait_for(&format!("{client} in the container's log"), || {
        let log = engine.podman("logs web");
        log.lines()
            .any(|line| line.contains(ip) && line.contains(port))
    });
}

#[test]
fn the_relay_and_its_pathway_follow_a_container_of_podman() {
    let rig = Rig::new("web\t123\t10.0.0.1:8080\tdocker:web@front\t80\tdocker:web@front\n");
    let mut engine = Engine::new(&rig);
    engine.podman(
        "run --detach --name web --network front localhost/busybox /bin/busybox httpd -f -vv -p 80",
    );
    let first = engine.address();
    let mut command = rig.wks.mmproxyctl("run --all --manage-pathways");
    command.env("DOCKER_HOST", engine.socket());
    let relay = rig.run(command);
    rig.wait_targets(&format!("docker:web@front ({first}:80)"));
    asked(&engine, "192.0.2.7:4000");
    asked(&engine, "[2001:db8::7]:4000");
    // a restart gives it another address; the engine's events say so at once, far before the interval
    engine.podman("restart --time 0 web");
    let second = engine.address();
    assert_ne!(first, second);
    rig.wait_targets(&format!("docker:web@front ({second}:80)"));
    asked(&engine, "192.0.2.7:4001");
    asked(&engine, "[2001:db8::7]:4001");
    let rules = rig.wks.ip("rule");
    assert!(
        rules.contains(&format!("from {second} fwmark 0x7b")),
        "{rules}"
    );
    let check = rig.wks.mmproxyctl("pathway check");
    let check = { check }.env("DOCKER_HOST", engine.socket()).output();
    let check = check.expect("mmproxyctl");
    assert!(check.status.success(), "{check:?}");
    // without its engine the last address stays, and the events are there again when it is
    engine.stop();
    asked_without_log(&engine, "192.0.2.7:4002");
    engine.start();
    engine.podman("restart --time 0 web");
    let third = engine.address();
    assert_ne!(second, third);
    rig.wait_targets(&format!("docker:web@front ({third}:80)"));
    asked(&engine, "192.0.2.7:4003");
    // one that is gone is said, with what the engine says
    engine.podman("rm --force --time 0 web");
    relay.wait_log("the last address is kept: the container engine says: no container with name");
}

fn asked_without_log(engine: &Engine<'_>, client: &str) {
    let mut stream = engine.rig.dial("10.0.0.1:8080");
    stream.write_all(&announce(client)).expect("send");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1."), "{answer}");
}
