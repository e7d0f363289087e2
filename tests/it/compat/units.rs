//! Old units under a real systemd: with nothing but the program swapped, and then by the steps of
//! docs/migrating.md to this repository's own.

use crate::relay::lab::Service;
use crate::systemd::Systemd;

use super::lab::Old;
use super::scripts::START;

/// A set-up script as the shell set-up has one: add-all and del-all, with the mark as the table.
const SETUP: &str = r#"set -eu
case $1 in add-all) verb=add flag=-A ;; del-all) verb=del flag=-D ;; esac
while read -r mark || [ -n "$mark" ]; do
    case $mark in ''|'#'*) continue ;; esac
    ip rule $verb from 127.0.0.1/8 fwmark "$mark" iif lo lookup "$mark"
    ip -6 rule $verb from ::1 fwmark "$mark" iif lo lookup "$mark"
    ip route $verb local 0.0.0.0/0 dev lo table "$mark"
    ip -6 route $verb local ::/0 dev lo table "$mark"
    for tool in iptables ip6tables; do
        $tool -t mangle $flag PREROUTING -m mark --mark "$mark" -j CONNMARK --save-mark
        $tool -t mangle $flag OUTPUT -m connmark --mark "$mark" -j CONNMARK --restore-mark
    done
done <config/pathways.conf
"#;

const PATHWAYS_UNIT: &str = "[Service]\nType=oneshot\nRemainAfterExit=true\nWorkingDirectory=/opt/mmproxy\n\
    ExecStart=/bin/bash scripts/setup-pathway.sh add-all\nExecStop=/bin/bash scripts/setup-pathway.sh del-all\n";

const INSTANCE_UNIT: &str = "[Unit]\nRequires=mmproxy-pathways.service\nAfter=mmproxy-pathways.service\n\
    [Service]\nType=simple\nUser=root\nWorkingDirectory=/opt/mmproxy/\n\
    Environment=MMPROXY_BIN=/opt/mmproxy/bin/go-mmproxy ALLOW_LIST_PATH=/opt/mmproxy/config/allow.txt\n\
    ExecStart=/bin/bash scripts/start-mmproxy.sh %i\nRestart=on-failure\nRestartSec=5\n";

const GO_MMPROXY_UNIT: &str = "[Service]\nType=simple\nLimitNOFILE=65535\n\
    ExecStartPost=/sbin/ip rule add from 127.0.0.1/8 iif lo table 125\n\
    ExecStartPost=/sbin/ip route add local 0.0.0.0/0 dev lo table 125\n\
    ExecStartPost=/sbin/ip -6 rule add from ::1/128 iif lo table 125\n\
    ExecStartPost=/sbin/ip -6 route add local ::/0 dev lo table 125\n\
    ExecStart=/usr/local/bin/go-mmproxy -4 127.0.0.1:2200 -6 \"[::1]:2200\" -allowed-subnets /etc/nets.txt -l 0.0.0.0:1234\n\
    Restart=on-failure\nRestartSec=10s\nAmbientCapabilities=CAP_NET_ADMIN\nNoNewPrivileges=true\n\
    PrivateDevices=true\nPrivateTmp=true\nProtectSystem=full\nProtectKernelTunables=true\n";

/// Clients of both families come through; each time others, for the tuples of the last ones linger.
fn assert_seen(old: &Old, relay: &str, services: &[Service; 2], number: u16) {
    let clients = [
        format!("203.0.113.7:{}", 41_000 + number),
        format!("[2001:db8:7::7]:{}", 41_000 + number),
    ];
    old.assert_sees(relay, services, [&clients[0], &clients[1]]);
}

#[test]
fn old_units_run_and_migrate() {
    let old = Old::new();
    old.lab.wks.sysctl("net.ipv4.conf.all.route_localnet", "1");
    let services = old.services(2200);
    let systemd = Systemd::boot(&old.lab.wks);

    // the shell set-up, its program swapped
    systemd.run_script(
        "mkdir -p /opt/mmproxy/scripts /opt/mmproxy/config /opt/mmproxy/bin /root/new
         mv /etc/systemd/system/mmproxy*.service /root/new; rm /etc/mmproxy/*
         mmproxyctl link --dir /opt/mmproxy/bin",
    );
    systemd.write("/opt/mmproxy/scripts/start-mmproxy.sh", START);
    systemd.write("/opt/mmproxy/scripts/setup-pathway.sh", SETUP);
    systemd.write("/opt/mmproxy/config/pathways.conf", "# marks\n123\n#125 ");
    systemd.write(
        "/opt/mmproxy/config/instances.tsv",
        "vps01-ssh\t123\t10.0.0.1:2222\t127.0.0.1\t2200\t::1",
    );
    systemd.write("/opt/mmproxy/config/allow.txt", "# vps01\n10.0.0.2\n");
    systemd.write(
        "/etc/systemd/system/mmproxy-pathways.service",
        PATHWAYS_UNIT,
    );
    systemd.write("/etc/systemd/system/mmproxy@.service", INSTANCE_UNIT);
    systemd.run("systemctl daemon-reload");
    systemd.run("systemctl start mmproxy@vps01-ssh");
    old.lab.wks.wait_listening(2222);
    assert_seen(&old, "10.0.0.1:2222", &services, 1);
    systemd.run("mmproxyctl --config-dir /opt/mmproxy/config check");

    // and its migration
    systemd.run("mmproxyctl import --write scripts /opt/mmproxy");
    systemd.run("cp /opt/mmproxy/config/allow.txt /etc/mmproxy/");
    systemd.run("systemctl disable --now mmproxy-pathways mmproxy@vps01-ssh");
    systemd.run("mmproxyctl import --clean scripts /opt/mmproxy");
    let left = old.lab.wks.ip("rule") + &old.lab.wks.run("iptables -t mangle -S");
    assert!(
        !left.contains("lookup 123") && !left.contains("CONNMARK"),
        "{left}"
    );
    systemd.run_script("cp /root/new/* /etc/systemd/system/; systemctl daemon-reload");
    systemd.run("systemctl start mmproxy@vps01-ssh");
    systemd.wait_active(&["mmproxy@vps01-ssh"]);
    assert_seen(&old, "10.0.0.1:2222", &services, 2);
    systemd.run("systemctl stop mmproxy-pathways");

    // go-mmproxy's unit, its program swapped; hardened as Debian's, without a runtime directory
    systemd.run("mmproxyctl link --dir /usr/local/bin");
    systemd.write("/etc/nets.txt", "10.0.0.0/24\nfd00::/64\n");
    systemd.write("/etc/systemd/system/go-mmproxy.service", GO_MMPROXY_UNIT);
    systemd.run("systemctl daemon-reload");
    systemd.run("systemctl start go-mmproxy");
    old.lab.wks.wait_listening(1234);
    assert_seen(&old, "10.0.0.1:1234", &services, 3);

    // and its migration
    systemd.run_script(
        "rm /etc/mmproxy/*; mmproxyctl import --write units; echo 10.0.0.2 >/etc/mmproxy/allow.txt",
    );
    systemd.run("systemctl disable --now go-mmproxy");
    systemd.run("mmproxyctl import --clean units");
    let left = old.lab.wks.ip("rule") + &old.lab.wks.ip("-6 rule");
    assert!(!left.contains("lookup 125"), "{left}");
    systemd.run("mmproxyctl pathway add --all");
    systemd.run("systemctl start mmproxy");
    systemd.wait_active(&["mmproxy"]);
    assert_seen(&old, "10.0.0.1:1234", &services, 4);
}
