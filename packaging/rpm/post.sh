# The old programs' names, unless something else has them; see packaging/debian/postinst for the rest.
mmproxyctl link --dir /usr/bin || true
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    if [ "$1" -gt 1 ]; then
        systemctl try-restart mmproxy.service 'mmproxy@*.service' || true
    fi
fi
