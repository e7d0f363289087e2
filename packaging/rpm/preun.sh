# At the end, not at an upgrade: stops the package's own units, the pathways last, and removes the links.
if [ "$1" -eq 0 ]; then
    if [ -d /run/systemd/system ]; then
        for unit in $(systemctl list-units --plain --no-legend 'mmproxy.service' 'mmproxy@*.service' | cut -d ' ' -f 1) \
            mmproxy-pathways.service; do
            case $(systemctl show --value -p FragmentPath "$unit") in
                /usr/lib/systemd/system/* | /lib/systemd/system/*) systemctl stop "$unit" || true ;;
            esac
        done
    fi
    for name in go-mmproxy mmproxy; do
        if [ "$(readlink /usr/bin/$name)" = mmproxyctl ]; then
            rm -f /usr/bin/$name
        fi
    done
fi
