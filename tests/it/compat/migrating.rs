//! docs/migrating.md, run as it stands: old set-ups under a real systemd, with nothing but the program
//! swapped after the second step, and this repository's own units after the fifth.

use crate::relay::lab::Service;
use crate::support::net::{Host, wait_for};
use crate::systemd::Systemd;
use crate::udp::lab as udp;

use super::lab::Old;
use super::page::{Section, section, sections};
use super::scripts::{SETUP, START};

/// The sections that a test here walks through.
const WALKED: [&str; 6] = [
    "go-mmproxy",
    "kzemek's container example",
    "cloudflare/mmproxy",
    "mmproxy-rs",
    "The mmproxy with a JSON file",
    "mmproxy-service",
];

/// An old program, which must not be what runs in the end.
const OLD_PROGRAM: &str = "#!/bin/sh\necho the old program >&2\nexit 3\n";

/// What the READMEs of all ancestors do for loopback targets, as their units do it.
const ROUTING: &str = "ExecStartPost=/sbin/ip rule add from 127.0.0.1/8 iif lo table 123\n\
    ExecStartPost=/sbin/ip route add local 0.0.0.0/0 dev lo table 123\n\
    ExecStartPost=/sbin/ip -6 rule add from ::1/128 iif lo table 123\n\
    ExecStartPost=/sbin/ip -6 route add local ::/0 dev lo table 123\n";

/// A machine with an old set-up, this program installed beside it, and the page's section about it.
struct Machine {
    old: Old,
    systemd: Systemd,
    section: Section,
    /// Clients so far: each has a port of its own, for the tuples of the last ones linger.
    clients: u16,
}

impl Machine {
    fn new(title: &str) -> Self {
        let old = Old::new();
        let systemd = Systemd::boot(&old.lab.wks);
        // the units where a package has them, and no files yet
        systemd.run_script(
            "mv /etc/systemd/system/mmproxy*.service /usr/lib/systemd/system/; rm /etc/mmproxy/*
             systemctl daemon-reload",
        );
        Self {
            old,
            systemd,
            section: section(title),
            clients: 41_000,
        }
    }

    /// A file of the old set-up; programs can be executed.
    fn has(&self, path: &str, text: &str) {
        let dir = path.rsplit_once('/').expect("a directory").0;
        self.systemd
            .run_script(&format!("mkdir -p {dir}; rm -f {path}"));
        self.systemd.write(path, text);
        if text.starts_with("#!") {
            self.systemd.run_script(&format!("chmod +x {path}"));
        }
    }

    /// The commands of a step, with this lab's addresses.
    fn step(&self, step: usize) {
        self.run(&self.section.step(step));
    }

    fn run(&self, commands: &str) {
        let here = commands
            .replace("100.103.104.105", "10.0.0.2")
            .replace("192.0.2.1", "10.0.0.1");
        assert!(!here.is_empty(), "no commands in {}", self.section.title);
        self.systemd.run_script(&format!("cd /root\n{here}"));
    }

    /// Clients of both families come through, and the services see them.
    fn assert_seen(&mut self, relay: &str, services: &[Service; 2]) {
        let port = relay
            .rsplit_once(':')
            .expect("a port")
            .1
            .parse()
            .expect("a number");
        self.old.lab.wks.wait_listening(port);
        self.clients += 1;
        let clients = ["203.0.113.7", "[2001:db8:7::7]"].map(|ip| format!("{ip}:{}", self.clients));
        self.old
            .assert_sees(relay, services, [&clients[0], &clients[1]]);
    }

    /// Nothing of the old routing is left.
    fn assert_clean(&self) {
        let wks = &self.old.lab.wks;
        let left = wks.ip("rule")
            + &wks.ip("-6 rule")
            + &wks.run("iptables -t mangle -S")
            + &wks.run("ip6tables -t mangle -S");
        for what in ["lookup 123", "lookup 100", "CONNMARK"] {
            assert!(!left.contains(what), "{left}");
        }
    }

    /// The units of this program are what runs.
    fn assert_new(&self, unit: &str) {
        self.systemd.wait_active(&["mmproxy-pathways", unit]);
        let file = self.systemd.show(unit, "FragmentPath");
        assert!(file.contains("/lib/systemd/system/"), "{file}");
    }
}

#[test]
fn every_section_of_the_page_is_walked_through() {
    let titles: Vec<_> = sections()
        .into_iter()
        .map(|section| section.title)
        .collect();
    assert_eq!(titles.len(), WALKED.len(), "{titles:?}");
    for (title, walked) in titles.iter().zip(WALKED) {
        assert!(title.starts_with(walked), "{title}: {walked}");
    }
}

#[test]
fn go_mmproxy() {
    let mut machine = Machine::new(WALKED[0]);
    let services = machine.old.services(1000);
    machine.has("/usr/local/bin/go-mmproxy", OLD_PROGRAM);
    machine.has("/etc/nets.txt", "10.0.0.0/24\nfd00::/64\n");
    // with the hardening of Debian's
    machine.has(
        "/etc/systemd/system/go-mmproxy.service",
        &format!(
            "[Service]\nType=simple\nLimitNOFILE=65535\n{ROUTING}\
             ExecStart=/usr/local/bin/go-mmproxy -4 127.0.0.1:1000 -6 \"[::1]:1000\" -allowed-subnets /etc/nets.txt -l 0.0.0.0:1234\n\
             Restart=on-failure\nRestartSec=10s\nAmbientCapabilities=CAP_NET_ADMIN\nNoNewPrivileges=true\n\
             PrivateDevices=true\nPrivateTmp=true\nProtectSystem=full\nProtectKernelTunables=true\n\
             [Install]\nWantedBy=multi-user.target\n"
        ),
    );
    machine.run("systemctl daemon-reload; systemctl enable go-mmproxy");
    machine.step(1);
    machine.step(2);
    machine.assert_seen("10.0.0.1:1234", &services);
    machine.step(3);
    machine.step(4);
    machine.assert_clean();
    machine.step(5);
    machine.assert_new("mmproxy");
    machine.assert_seen("10.0.0.1:1234", &services);
}

#[test]
fn kzemeks_container_example() {
    let machine = Machine::new(WALKED[1]);
    // the container as Docker makes it: a bridge address as its way out
    let wks = &machine.old.lab.wks;
    let container = Host::new("echo");
    wks.link(
        "br0",
        &["10.5.5.1/24"],
        &container,
        "eth0",
        &["10.5.5.2/24"],
    );
    container.ip("route add default via 10.5.5.1");
    let service = Service::echo(&container, "0.0.0.0:9000");
    machine.has(
        "/root/docker-compose.yml",
        "services:\n  echo:\n    cap_add: [ NET_ADMIN ]\n    networks:\n      backend:\n        ipv4_address: 10.5.5.2\n\n  \
         go-mmproxy:\n    build:\n      context: ../../\n    \
         command: ./go-mmproxy -l 0.0.0.0:1234 -4 10.5.5.2:9000 -p tcp -v 2 -mark 123\n    privileged: true\n",
    );
    for step in [1, 3, 4, 5] {
        machine.step(step);
    }
    machine.assert_new("mmproxy");
    let client = "203.0.113.7:40000";
    let _open = machine
        .old
        .connect("10.0.0.1:1234".parse().expect("an address"), client);
    assert_eq!(service.peer(), client.parse().expect("an address"));
}

#[test]
fn cloudflares_mmproxy() {
    let machine = Machine::new(WALKED[2]);
    let wks = &machine.old.lab.wks;
    let services = machine.old.services(22);
    machine.has("/usr/local/bin/mmproxy", OLD_PROGRAM);
    machine.has("/etc/networks.txt", "10.0.0.0/24\n");
    machine.old.route_marks();
    machine.step(1);
    machine.step(2);
    wks.wait_listening(2222);
    let assert_seen = |port: u16| {
        for (ip, service) in ["203.0.113.7", "[2001:db8:7::7]"].iter().zip(&services) {
            let client: std::net::SocketAddr = format!("{ip}:{port}").parse().expect("an address");
            let relay = "10.0.0.1:2222".parse().expect("an address");
            let _open = machine.old.connect(relay, &client.to_string());
            // only the address, as there, unless told otherwise
            assert_eq!(service.peer().ip(), client.ip());
        }
    };
    assert_seen(41_000);
    machine.step(3);
    machine.step(4);
    machine.assert_clean();
    machine.step(5);
    machine.assert_new("mmproxy");
    assert_seen(41_001);
}

#[test]
fn mmproxy_rs() {
    let machine = Machine::new(WALKED[3]);
    let wks = &machine.old.lab.wks;
    let service = udp::Service::echo(wks, "127.0.0.1:8081");
    machine.has("/usr/local/bin/mmproxy", OLD_PROGRAM);
    wks.ip("rule add from 127.0.0.1/8 iif lo table 123");
    wks.ip("route add local 0.0.0.0/0 dev lo table 123");
    let assert_seen = |client: &str, what: &[u8]| {
        wait_for("the relay's socket", || {
            !wks.run("ss -Hlun sport = :8080").is_empty()
        });
        let relay = "10.0.0.1:8080".parse().expect("an address");
        udp::Proxy::new(&machine.old.lab.vps, relay).exchange(client, what);
        assert_eq!(service.peer_of(what), client.parse().expect("an address"));
    };
    machine.step(1);
    machine.step(2);
    assert_seen("203.0.113.7:41000", b"before");
    machine.step(3);
    machine.step(4);
    machine.assert_clean();
    machine.step(5);
    machine.assert_new("mmproxy");
    assert_seen("203.0.113.7:41001", b"after");
}

#[test]
fn the_json_form() {
    let mut machine = Machine::new(WALKED[4]);
    let services = machine.old.services(2222);
    machine.has("/usr/local/bin/mmproxy", OLD_PROGRAM);
    machine.has(
        "/etc/mmproxy.json",
        "{\n    \"router\": [\n        {\n            \"from\":\"0.0.0.0:1111\",\n            \
         \"to\":\"0.0.0.0:2222\",\n            \"to6\":\"[::1]:2222\"\n        }\n    ],\n    \"p\":\"tcp\",\n    \
         \"mark\":0,\n    \"v\":0,\n    \"listeners\":1,\n}\n",
    );
    let unit = format!(
        "[Unit]\nDescription=mmproxy\nAfter=network.target\n[Service]\nType=simple\nLimitNOFILE=65535\n{ROUTING}\
         ExecStart=/usr/local/bin/mmproxy -c /etc/mmproxy.json\nExecStopPost=/sbin/ip rule del from 127.0.0.1/8 iif lo table 123\n\
         Restart=on-failure\nRestartSec=10s\n[Install]\nWantedBy=multi-user.target\n"
    );
    machine.has("/etc/systemd/system/mmproxy.service", &unit);
    machine.run("systemctl daemon-reload; systemctl enable mmproxy");
    machine.step(1);
    machine.step(2);
    machine.assert_seen("10.0.0.1:1111", &services);

    // staying with the file and the unit
    machine.run(
        "systemctl stop mmproxy; ip -6 rule del table 123; ip route flush table 123; ip -6 route flush table 123",
    );
    machine.step(0);
    machine.assert_seen("10.0.0.1:1111", &services);
    let log = machine.systemd.journal();
    assert!(!log.contains("no allow list yet"), "{log}");

    // and back, for the other three steps
    machine.run(
        "systemctl stop mmproxy; ip -6 rule del table 123; ip route flush table 123; ip -6 route flush table 123",
    );
    machine.has("/etc/systemd/system/mmproxy.service", &unit);
    machine.run("rm -r /etc/mmproxy; systemctl daemon-reload; systemctl start mmproxy");
    machine.assert_seen("10.0.0.1:1111", &services);
    machine.step(3);
    machine.step(4);
    machine.assert_clean();
    machine.step(5);
    machine.assert_new("mmproxy");
    machine.assert_seen("10.0.0.1:1111", &services);
}

#[test]
fn the_shell_set_up() {
    let mut machine = Machine::new(WALKED[5]);
    // its rule for 127.0.0.0/8 alone does not work otherwise
    machine
        .old
        .lab
        .wks
        .sysctl("net.ipv4.conf.all.route_localnet", "1");
    let services = machine.old.services(2200);
    machine.has("/opt/mmproxy/bin/go-mmproxy", OLD_PROGRAM);
    machine.has("/opt/mmproxy/scripts/start-mmproxy.sh", START);
    machine.has("/opt/mmproxy/scripts/setup-pathway.sh", SETUP);
    machine.has("/opt/mmproxy/config/pathways.conf", "# marks\n123\n#125 ");
    machine.has(
        "/opt/mmproxy/config/instances.tsv",
        "vps01-ssh\t123\t10.0.0.1:2222\t127.0.0.1\t2200\t::1",
    );
    machine.has("/opt/mmproxy/config/allow.txt", "# vps01\n10.0.0.2\n");
    machine.has(
        "/etc/systemd/system/mmproxy-pathways.service",
        "[Service]\nType=oneshot\nRemainAfterExit=true\nWorkingDirectory=/opt/mmproxy\n\
         ExecStart=/bin/bash scripts/setup-pathway.sh add-all\nExecStop=/bin/bash scripts/setup-pathway.sh del-all\n\
         [Install]\nWantedBy=multi-user.target\n",
    );
    machine.has(
        "/etc/systemd/system/mmproxy@.service",
        "[Unit]\nRequires=mmproxy-pathways.service\nAfter=mmproxy-pathways.service\n\
         [Service]\nType=simple\nUser=root\nWorkingDirectory=/opt/mmproxy/\n\
         Environment=MMPROXY_BIN=/opt/mmproxy/bin/go-mmproxy ALLOW_LIST_PATH=/opt/mmproxy/config/allow.txt\n\
         ExecStart=/bin/bash scripts/start-mmproxy.sh %i\nRestart=on-failure\nRestartSec=5\n\
         [Install]\nWantedBy=multi-user.target\n",
    );
    machine.run("systemctl daemon-reload; systemctl enable mmproxy-pathways mmproxy@vps01-ssh");
    machine.step(1);
    machine.step(2);
    machine.assert_seen("10.0.0.1:2222", &services);
    machine.step(3);
    machine.step(4);
    machine.assert_clean();
    machine.step(5);
    machine.assert_new("mmproxy@vps01-ssh");
    machine.assert_seen("10.0.0.1:2222", &services);
}
