//! The packages of packaging/build.sh on a throw-away copy of this machine with a real systemd: installed
//! over Debian's go-mmproxy, upgraded under a connection, removed, purged.

use std::path::{Path, PathBuf};

use crate::compat::lab::Old;
use crate::relay::lab::{Service, exchange};
use crate::systemd::Systemd;

/// The package of this kind that was built last.
fn built(kind: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_mmproxyctl"))
        .ancestors()
        .nth(2);
    let dir = target.expect("the target directory").join("packages");
    let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut paths = files.map(|entry| entry.path());
    paths
        .find(|path| path.extension().is_some_and(|suffix| suffix == kind))
        .unwrap_or_else(|| panic!("no .{kind} in {}: run ./packaging/build.sh", dir.display()))
}

/// A machine without any of this program, and services on port 2200.
fn machine() -> (Old, Systemd, [Service; 2]) {
    let old = Old::new();
    let services = old.services(2200);
    let systemd = Systemd::boot(&old.lab.wks);
    systemd.run_script(
        "rm -r /usr/local/bin/mmproxyctl /etc/systemd/system/mmproxy*.service /etc/mmproxy
         systemctl daemon-reload",
    );
    (old, systemd, services)
}

fn assert_seen(old: &Old, services: &[Service; 2], port: u16) {
    old.lab.wks.wait_listening(2222);
    let clients = [
        format!("203.0.113.7:{port}"),
        format!("[2001:db8:7::7]:{port}"),
    ];
    old.assert_sees("10.0.0.1:2222", services, [&clients[0], &clients[1]]);
}

/// As Debian's go-mmproxy has it as an example.
const UNIT: &str = "[Service]\nEnvironmentFile=-/etc/default/%p\nType=simple\nLimitNOFILE=65535\n\
    ExecStartPost=/sbin/ip rule add from 127.0.0.1/8 iif lo table 123\n\
    ExecStartPost=/sbin/ip route add local 0.0.0.0/0 dev lo table 123\n\
    ExecStartPost=/sbin/ip -6 rule add from ::1/128 iif lo table 123\n\
    ExecStartPost=/sbin/ip -6 route add local ::/0 dev lo table 123\n\
    ExecStart=/usr/bin/go-mmproxy $DAEMON_ARGS\n\
    ExecStopPost=/sbin/ip rule del from 127.0.0.1/8 iif lo table 123\n\
    ExecStopPost=/sbin/ip route del local 0.0.0.0/0 dev lo table 123\n\
    ExecStopPost=/sbin/ip -6 rule del from ::1/128 iif lo table 123\n\
    ExecStopPost=/sbin/ip -6 route del local ::/0 dev lo table 123\n\
    AmbientCapabilities=CAP_NET_ADMIN\nNoNewPrivileges=true\nPrivateDevices=true\n";

/// Configuration as somebody writes it from the installed samples, and the units of it.
const OWN: &str = "cd /etc/mmproxy
    for file in pathways.conf instances.tsv allow.txt; do test -s $file.example; done
    echo 123 >pathways.conf
    printf 'ssh\\t123\\t10.0.0.1:2222\\t127.0.0.1\\t2200\\t::1\\n' >instances.tsv
    echo 10.0.0.2 >allow.txt
    systemctl enable --now mmproxy-pathways mmproxy@ssh";

#[test]
fn the_debian_package_takes_the_place_of_go_mmproxy() {
    let (old, systemd, services) = machine();
    systemd.run("dpkg-query -W go-mmproxy");
    systemd.write("/etc/systemd/system/go-mmproxy.service", UNIT);
    systemd.write(
        "/etc/default/go-mmproxy",
        "DAEMON_ARGS=-4 127.0.0.1:2200 -6 \"[::1]:2200\" -l 0.0.0.0:2222\n",
    );
    systemd.run("systemctl daemon-reload");
    systemd.run("systemctl start go-mmproxy");
    assert_seen(&old, &services, 41_001);

    // dpkg removes the other package, and nothing that the unit needs
    systemd.copy(&built("deb"), "/root/new.deb");
    systemd.run("dpkg -i /root/new.deb");
    let states =
        systemd.run("dpkg-query -W -f ${Package}:${db:Status-Abbrev}\\n go-mmproxy mmproxyctl");
    // c: of the other package only its configuration is there
    assert!(
        states.contains("go-mmproxy:ic") && states.contains("mmproxyctl:ii"),
        "{states}"
    );
    for name in ["go-mmproxy", "mmproxy"] {
        assert_eq!(
            systemd.run(&format!("readlink /usr/bin/{name}")).trim(),
            "mmproxyctl"
        );
    }
    systemd.run("systemctl restart go-mmproxy");
    assert_seen(&old, &services, 41_002);
    let pid = systemd.show("go-mmproxy", "MainPID");
    assert_eq!(
        systemd.run(&format!("readlink /proc/{pid}/exe")).trim(),
        "/usr/bin/mmproxyctl"
    );
    systemd.run("systemctl stop go-mmproxy");
    systemd.run("mmproxyctl import --clean units");

    // the package's own units, and an upgrade under a connection
    systemd.run_script(OWN);
    assert_seen(&old, &services, 41_003);
    let mut open = old.connect(
        "10.0.0.1:2222".parse().expect("an address"),
        "203.0.113.7:41004",
    );
    assert_eq!(services[0].peer().port(), 41_004);
    let before = systemd.show("mmproxy@ssh", "MainPID");
    systemd.run("dpkg -i /root/new.deb");
    systemd.wait_active(&["mmproxy-pathways", "mmproxy@ssh"]);
    assert_ne!(systemd.show("mmproxy@ssh", "MainPID"), before);
    exchange(&mut open, b"over the upgrade");
    drop(open);
    assert_seen(&old, &services, 41_005);
    systemd.run_script(
        "test -s /usr/share/man/man1/mmproxyctl.1.gz -a -s /usr/share/man/man1/go-mmproxy.1.gz
         test -s /usr/share/doc/mmproxyctl/copyright -a -s /usr/share/doc/mmproxyctl/docs/migrating.md
         bash -n /usr/share/bash-completion/completions/mmproxyctl",
    );

    // removed, the configuration stays; purged, only what is the administrator's does
    systemd.run("dpkg -r mmproxyctl");
    assert_gone(&old, &systemd);
    systemd.run_script("test -e /etc/mmproxy/instances.tsv.example");
    systemd.run("dpkg -P mmproxyctl");
    systemd.run_script(
        "cd /etc/mmproxy; test -e instances.tsv -a -e allow.txt -a ! -e instances.tsv.example
         test -z \"$(find /etc/systemd/system -name 'mmproxy*')\" -a ! -e /run/mmproxy",
    );
}

#[test]
fn the_rpm_package_installs_and_goes() {
    let (old, systemd, services) = machine();
    // Debian's has the link's name, as anything may: it stays
    systemd.run("dpkg -r go-mmproxy");
    systemd.copy(&built("rpm"), "/root/new.rpm");
    let files = systemd.run("rpm -qlp /root/new.rpm");
    for file in [
        "/usr/bin/mmproxyctl",
        "/usr/lib/systemd/system/mmproxy@.service",
        "/etc/mmproxy/instances.tsv.example",
        "/usr/share/man/man1/mmproxyctl.1.gz",
        "/usr/share/man/man1/go-mmproxy.1.gz",
        "/usr/share/zsh/site-functions/_mmproxyctl",
        "/usr/share/licenses/mmproxyctl/LICENSE-MIT",
    ] {
        assert!(
            files.lines().any(|line| line == file),
            "no {file}:\n{files}"
        );
    }
    let configuration = systemd.run("rpm -qcp /root/new.rpm");
    assert_eq!(configuration.lines().count(), 3, "{configuration}");
    // the libraries are Debian's, which its rpm knows nothing of
    systemd.run("rpm --dbpath /root/rpm -i --nodeps /root/new.rpm");
    for name in ["go-mmproxy", "mmproxy"] {
        assert_eq!(
            systemd.run(&format!("readlink /usr/bin/{name}")).trim(),
            "mmproxyctl"
        );
    }
    systemd.run_script(OWN);
    assert_seen(&old, &services, 41_001);
    let before = systemd.show("mmproxy@ssh", "MainPID");
    systemd.run("rpm --dbpath /root/rpm -U --nodeps --replacepkgs /root/new.rpm");
    systemd.wait_active(&["mmproxy-pathways", "mmproxy@ssh"]);
    assert_ne!(systemd.show("mmproxy@ssh", "MainPID"), before);
    assert_seen(&old, &services, 41_002);
    systemd.run("rpm --dbpath /root/rpm -e mmproxyctl");
    assert_gone(&old, &systemd);
    systemd.run_script(
        "test -e /etc/mmproxy/instances.tsv -a ! -e /etc/mmproxy/instances.tsv.example",
    );
}

/// No program, no process, nothing in the kernel.
fn assert_gone(old: &Old, systemd: &Systemd) {
    systemd.run_script(
        "for file in mmproxyctl go-mmproxy mmproxy; do test ! -L /usr/bin/$file -a ! -e /usr/bin/$file; done
         for unit in mmproxy@ssh mmproxy-pathways; do ! systemctl is-active --quiet $unit; done",
    );
    let wks = &old.lab.wks;
    let left = wks.ip("rule") + &wks.ip("-6 rule") + &wks.run("iptables -t mangle -S");
    assert!(
        !left.contains("123") && !left.contains("CONNMARK"),
        "{left}"
    );
}
