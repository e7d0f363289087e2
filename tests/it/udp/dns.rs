//! The whole chain with real programs: dig — dnsdist — mmproxyctl — unbound, which reads no PROXY protocol.
//! What counts is what unbound logs.

use nix::sys::signal::Signal;

use crate::chain::deployment::{CLIENT, Deployment, VPS01, VPS01_PRIVATE, WKS01_PRIVATE, shipped};
use crate::relay::lab::SOON;
use crate::support::net::{Host, Running, wait_for};

const ANSWER: &str = "192.0.2.53";

/// unbound on these addresses of a host, with every query in its log.
pub(crate) fn unbound(host: &Host, addresses: &[&str]) -> Running {
    let interfaces: String = addresses
        .iter()
        .map(|address| format!("    interface: {address}\n"))
        .collect();
    let config = host.write(
        "unbound.conf",
        format!(
            "server:\n{interfaces}    do-daemonize: no\n    username: \"\"\n    chroot: \"\"\n    pidfile: \"\"\n    \
             use-syslog: no\n    logfile: \"\"\n    log-queries: yes\n    module-config: \"iterator\"\n    \
             access-control: 0.0.0.0/0 allow\n    access-control: ::/0 allow\n    \
             local-zone: \"example.test.\" redirect\n    local-data: \"example.test. A {ANSWER}\"\n    \
             local-zone: \"invalid.\" always_nxdomain\nremote-control:\n    control-enable: no\n"
        ),
    );
    let mut command = host.command("unbound");
    command.args(["-d", "-c"]).arg(config);
    let running = host.spawn(command);
    running.wait_log("start of service");
    running
}

/// The shipped example on wks01, with these targets instead of 127.0.0.1 and ::1; dnsdist on vps01.
struct Chain {
    lab: Deployment,
    relays: Vec<Running>,
    _dnsdist: Running,
}

impl Chain {
    /// `lab` has the hosts, and its service is up.
    fn new(lab: Deployment, targets: [&str; 2]) -> Self {
        let example = std::fs::read_to_string(shipped("examples/dnsdist/instances.tsv"))
            .expect("the shipped example");
        let instances = example
            .replace("\t127.0.0.1\t", &format!("\t{}\t", targets[0]))
            .replace("\t::1", &format!("\t{}", targets[1]));
        lab.wks01.write("etc/instances.tsv", instances);
        let added = lab.wks01.mmproxyctl("pathway add-all").output();
        let added = added.expect("mmproxyctl");
        assert!(added.status.success(), "{added:?}");
        let relays = ["vps01-dns", "vps01-dns-tcp"].map(|name| {
            let relay = lab
                .wks01
                .spawn(lab.wks01.mmproxyctl(&format!("run {name}")));
            relay.wait_log("relaying");
            relay
        });
        let mut dnsdist = lab.vps01.command("dnsdist");
        dnsdist
            .args(["--supervised", "--disable-syslog", "-C"])
            .arg(shipped("examples/dnsdist/dnsdist.conf"));
        let dnsdist = lab.vps01.spawn(dnsdist);
        // its health check has come through, both ways
        dnsdist.wait_log("as 'up'");
        Self {
            lab,
            relays: relays.into(),
            _dnsdist: dnsdist,
        }
    }

    /// Asks from the client through dnsdist, over both families and both protocols.
    fn assert_true_clients(&self, service: &Running) {
        for (number, (client, address)) in CLIENT.into_iter().zip(VPS01).enumerate() {
            for protocol in ["+notcp", "+tcp"] {
                let name = format!("{number}{protocol}.example.test").replace('+', "-");
                let answer = self.lab.client.run(&format!(
                    "dig @{address} {protocol} +tries=1 +time=5 +short {name}"
                ));
                assert_eq!(answer.trim(), ANSWER);
                service.wait_log(&format!("info: {client} {name}. A IN"));
            }
        }
        // dnsdist's own health checks say LOCAL
        service.wait_log(&format!("info: {VPS01_PRIVATE} health.invalid. A IN"));
    }

    /// What the UDP relay says about itself when it is stopped.
    fn stopped(mut self) -> String {
        let relay = &mut self.relays[0];
        relay.signal(Signal::SIGTERM);
        assert!(relay.wait(SOON).success());
        relay.log()
    }
}

#[test]
fn a_dns_server_on_loopback() {
    let lab = Deployment::new();
    let service = unbound(&lab.wks01, &["127.0.0.1", "::1"]);
    Chain::new(lab, ["127.0.0.1", "::1"]).assert_true_clients(&service);
}

#[test]
fn a_dns_server_on_an_address_of_the_host() {
    let lab = Deployment::new();
    lab.wks01.address("lo", "fd00:123::1/128");
    let service = unbound(&lab.wks01, &[WKS01_PRIVATE, "fd00:123::1"]);
    Chain::new(lab, [WKS01_PRIVATE, "fd00:123::1"]).assert_true_clients(&service);
}

#[test]
fn a_dns_server_in_a_container() {
    let lab = Deployment::new();
    let container = Host::new("container");
    lab.wks01.link(
        "br0",
        &["172.18.0.1/24", "fd18::1/64"],
        &container,
        "eth0",
        &["172.18.0.2/24", "fd18::2/64"],
    );
    container.ip("route add default via 172.18.0.1");
    container.ip("-6 route add default via fd18::1");
    let service = unbound(&container, &["172.18.0.2", "fd18::2"]);
    Chain::new(lab, ["172.18.0.2", "fd18::2"]).assert_true_clients(&service);
}

#[test]
fn ten_thousand_queries_without_a_loss() {
    const QUERIES: usize = 10_000;
    let lab = Deployment::new();
    let service = unbound(&lab.wks01, &["127.0.0.1", "::1"]);
    let chain = Chain::new(lab, ["127.0.0.1", "::1"]);
    for (family, address) in ["v4", "v6"].into_iter().zip(VPS01) {
        let names: String = (0..QUERIES / 2)
            .map(|number| format!("{family}-{number}.example.test\n"))
            .collect();
        let names = chain.lab.client.write("names", names);
        let answers = chain.lab.client.run(&format!(
            "dig @{address} +tries=1 +time=5 +short -f {}",
            names.display()
        ));
        let answered = answers.lines().filter(|line| *line == ANSWER).count();
        assert_eq!(answered, QUERIES / 2, "{family}");
        assert_eq!(answers.lines().count(), QUERIES / 2, "{family}");
    }
    let mut logged = [0, 0];
    wait_for("the log", || {
        let log = service.log();
        logged = [0, 1].map(|family| {
            let line = format!("info: {} v{}-", CLIENT[family], [4, 6][family]);
            log.matches(&line).count()
        });
        logged == [QUERIES / 2; 2]
    });
    let said = chain.stopped();
    let line = said.lines().find(|line| line.contains("datagrams.in="));
    let line = line.unwrap_or_else(|| panic!("no count of datagrams: {said}"));
    for zero in [
        "dropped=0",
        "overflow.in=0",
        "overflow.out=0",
        "unanswered=0",
    ] {
        assert!(line.contains(zero), "{zero}: {line}");
    }
}
