//! What a reload takes out of the files while connections are open there: the pathway's pieces stay until the
//! last of them has ended, and then go by themselves.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::pathway::{assert_same, effects, interface};
use crate::relay::lab::announce;
use crate::supervisor::{Lab, Proxied, echo, stderr};
use crate::support::net::{Host, Running, wait_for};

/// An address of the host's own, and one of a host behind it.
const OWN: &str = "10.0.0.2";
const BEHIND: &str = "10.1.0.2";

/// What stays in instances.tsv.
const STAYS: &str = "stays\t123\t127.0.0.1:2004\t127.0.0.1\t9003\t-\theader-timeout=1s\n";
/// Targets beyond loopback, and the only instance of a pathway.
const LEAVES: &str = "\
own\t123\t127.0.0.1:2001\t10.0.0.2\t9001\t-\theader-timeout=1s
behind\t123\t127.0.0.1:2002\t10.1.0.2\t9002\t-\theader-timeout=1s
only\t124\t127.0.0.1:2003\t127.0.0.1\t9003\t-\theader-timeout=1s
";

/// Longer than any look for what has ended is away from the next: what has to stay is there after it.
const SEVERAL_LOOKS: Duration = Duration::from_millis(4500);

/// A [`Lab`] with services at an own address and on a host behind.
struct Rig {
    lab: Lab,
    _behind: Host,
}

impl Rig {
    fn new() -> Self {
        let lab = Lab::new(&[9003]);
        interface(&lab.host, &["10.0.0.2/24"]);
        let behind = Host::new("behind");
        lab.host
            .link("eth1", &["10.1.0.1/24"], &behind, "eth0", &["10.1.0.2/24"]);
        behind.ip("route add default via 10.1.0.1");
        for (host, at, port) in [(&lab.host, OWN, 9001), (&behind, BEHIND, 9002)] {
            let at: Ipv4Addr = at.parse().expect("an address");
            let listener = host.enter(|| TcpListener::bind((at, port)).expect("bind"));
            std::thread::spawn(move || echo(&listener, port));
        }
        let rig = Self {
            lab,
            _behind: behind,
        };
        rig.files("123\n124\n", &[STAYS, LEAVES]);
        rig
    }

    fn files(&self, pathways: &str, instances: &[&str]) {
        self.lab.host.write("etc/pathways.conf", pathways);
        self.lab.host.write("etc/instances.tsv", instances.concat());
    }

    fn rules(&self) -> String {
        self.lab.host.ip("rule")
    }

    fn has_target(&self, target: &str) -> bool {
        self.rules()
            .contains(&format!("from {target} fwmark 0x7b/"))
    }

    fn has_pathway(&self, mark: &str) -> bool {
        self.rules().contains(&format!("fwmark {mark}/"))
    }

    /// Panics unless no verb finds a fault, and the list says what stays.
    fn assert_no_alarm(&self, told: &[&str]) {
        let checked = self.lab.ctl("pathway check");
        assert!(checked.status.success(), "{}", stderr(&checked));
        let listed = self.lab.ctl("pathway list");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        for text in told {
            assert!(listed.contains(text), "no '{text}' in\n{listed}");
        }
        assert!(!listed.contains("leftovers"), "{listed}");
    }

    fn end(&self, mut running: Running) {
        running.signal(Signal::SIGTERM);
        assert!(running.wait(Duration::from_secs(10)).success());
    }
}

/// Exchanges something on each again and again.
fn talk(open: &mut [Proxied], time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        for connection in &mut *open {
            connection.echo("still there");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_reload_leaves_open_connections_their_way_back_until_they_have_ended() {
    let rig = Rig::new();
    let lab = &rig.lab;
    rig.files("123\n124\n", &[STAYS]);
    let nothing = effects(&lab.host);
    let running = lab.run("--all --manage-pathways");
    let without = effects(&lab.host);
    rig.files("123\n124\n", &[STAYS, LEAVES]);
    lab.reload("all");
    let mut open: Vec<Proxied> = (2001..=2003)
        .map(|port| lab.proxied(port, 38000 + port).expect("relayed"))
        .collect();
    // accepted, and its target not yet known to be needed
    let mut late = lab
        .host
        .enter(|| TcpStream::connect("127.0.0.1:2001").expect("connect"));
    wait_for("the connection to be accepted", || {
        let conns = lab.ctl("conns --json");
        String::from_utf8_lossy(&conns.stdout).contains("\"header\"")
    });
    rig.files("123\n124\n", &[STAYS]);
    let changes = lab.reload("all");
    assert_eq!(
        changes["stopped"],
        serde_json::json!(["behind", "only", "own"])
    );
    assert_eq!(changes["pathways_disappeared"], serde_json::json!([124]));
    std::thread::sleep(Duration::from_millis(600));
    late.set_read_timeout(Some(Duration::from_secs(5)))
        .expect("read timeout");
    late.write_all(b"PROXY TCP4 192.0.2.7 127.0.0.1 37000 2001\r\n")
        .expect("the header");
    let mut greeting = [0; 5];
    late.read_exact(&mut greeting).expect("relayed");
    assert_eq!(&greeting, b"9001\n");
    drop(late);

    talk(&mut open, SEVERAL_LOOKS);
    rig.assert_no_alarm(&["mark 123: no file wants 10.0.0.2, 10.1.0.2 any more"]);
    running.wait_log("mark=124 connections=1");
    running.wait_log("no file wants 10.0.0.2, 10.1.0.2 any more");
    // what is kept is kept in place, too
    lab.host
        .ip("rule del priority 100 from 10.0.0.2 fwmark 123/0xff lookup 123");
    wait_for("the repair", || rig.has_target(OWN));
    talk(&mut open, Duration::from_millis(100));

    let only = open.pop().expect("three");
    open.remove(0).close();
    wait_for("the rule of the own address to go", || !rig.has_target(OWN));
    assert!(rig.has_target(BEHIND) && rig.has_pathway("0x7c"));
    talk(&mut open, Duration::from_millis(100));
    only.close();
    wait_for("the pathway to go", || !rig.has_pathway("0x7c"));
    assert!(rig.has_target(BEHIND));
    talk(&mut open, Duration::from_millis(100));
    open.into_iter().for_each(Proxied::close);
    wait_for("the rest to go", || !rig.has_target(BEHIND));
    wait_for("the kernel to be as the files say", || {
        effects(&lab.host) == without
    });
    rig.end(running);
    assert_same(&effects(&lab.host), &nothing, "the end");
}

#[test]
fn more_reloads_and_the_end_while_connections_drain() {
    let rig = Rig::new();
    let lab = &rig.lab;
    let nothing = effects(&lab.host);
    let mut running = lab.run("--all --manage-pathways --drain-timeout 1s");
    let whole = effects(&lab.host);
    let connect = |port: u16, client: u16| lab.proxied(port, client).expect("relayed");
    let mut open: Vec<Proxied> = (2001..=2003)
        .map(|port| connect(port, 38000 + port))
        .collect();
    // one instance after the other, and its pathway out of the files as well
    let (own, rest) = LEAVES.split_once('\n').expect("lines");
    rig.files("123\n124\n", &[STAYS, own, "\n"]);
    lab.reload("all");
    talk(&mut open, Duration::from_millis(700));
    rig.files("123\n", &[STAYS]);
    lab.reload("all");
    talk(&mut open, Duration::from_millis(700));
    // back while it drains, for new connections beside the open one
    rig.files("123\n124\n", &[STAYS, rest]);
    lab.reload("all");
    open.push(connect(2003, 39003));
    open.push(connect(2002, 39002));
    talk(&mut open, Duration::from_millis(700));
    rig.files("123\n124\n", &[STAYS, LEAVES]);
    lab.reload("all");
    talk(&mut open, SEVERAL_LOOKS);
    open.into_iter().for_each(Proxied::close);
    std::thread::sleep(SEVERAL_LOOKS);
    assert_same(&effects(&lab.host), &whole, "all is back");

    let mut open: Vec<Proxied> = (2001..=2003)
        .map(|port| connect(port, 40000 + port))
        .collect();
    rig.files("123\n", &[STAYS]);
    lab.reload("all");
    talk(&mut open, Duration::from_millis(700));
    running.signal(Signal::SIGTERM);
    running.wait_log("stopping: no new connections");
    // until the drain timeout, too
    talk(&mut open, Duration::from_millis(300));
    assert!(running.wait(Duration::from_secs(10)).success());
    assert_same(&effects(&lab.host), &nothing, "the end while they drain");
}

#[test]
fn a_successor_leaves_the_way_back_to_who_came_before() {
    let rig = Rig::new();
    let lab = &rig.lab;
    let mut first = lab.run("--all --manage-pathways");
    let mut open: Vec<Proxied> = (2001..=2003)
        .map(|port| lab.proxied(port, 38000 + port).expect("relayed"))
        .collect();
    // the successor reads files in which they are no more
    rig.files("123\n", &[STAYS]);
    let upgraded = lab.ctl("upgrade --json");
    assert!(upgraded.status.success(), "{}", stderr(&upgraded));
    let json: serde_json::Value = serde_json::from_slice(&upgraded.stdout).expect("JSON");
    talk(&mut open, SEVERAL_LOOKS);
    rig.assert_no_alarm(&["10.0.0.2, 10.1.0.2", "in no file, in use"]);
    open.into_iter().for_each(Proxied::close);
    assert!(first.wait(Duration::from_secs(10)).success());
    assert!(!rig.has_pathway("0x7c"), "{}", first.log());
    wait_for("the targets to go", || {
        !rig.has_target(OWN) && !rig.has_target(BEHIND)
    });
    assert!(rig.has_pathway("0x7b"));
    let successor = i32::try_from(json["all"]["to"].as_i64().expect("pid")).expect("pid");
    let successor = nix::unistd::Pid::from_raw(successor);
    nix::sys::signal::kill(successor, Signal::SIGTERM).expect("end the successor");
    wait_for("the end of the successor", || {
        nix::sys::signal::kill(successor, None).is_err()
    });
    assert!(!rig.has_pathway("0x7b"));
}

#[test]
fn the_watch_leaves_them_to_relays_of_other_processes() {
    let rig = Rig::new();
    let lab = &rig.lab;
    let nothing = effects(&lab.host);
    let watch = lab
        .host
        .spawn(lab.host.mmproxyctl("pathway watch --poll 500ms"));
    watch.wait_log("pathways are in place");
    let whole = effects(&lab.host);
    let relays = lab.run("--all");
    let mut open: Vec<Proxied> = (2001..=2003)
        .map(|port| lab.proxied(port, 38000 + port).expect("relayed"))
        .collect();
    rig.files("123\n", &[STAYS]);
    lab.reload("all");
    watch.wait_log("INFO reloaded");
    talk(&mut open, SEVERAL_LOOKS);
    rig.assert_no_alarm(&["10.0.0.2, 10.1.0.2", "in no file, in use"]);
    watch.wait_log("mark=124 connections=1");
    let only = open.pop().expect("three");
    open.into_iter().for_each(Proxied::close);
    wait_for("the targets to go", || {
        !rig.has_target(OWN) && !rig.has_target(BEHIND)
    });
    assert!(rig.has_pathway("0x7c"));
    // back in the files: it stays when the connection ends
    rig.files("123\n124\n", &[STAYS, LEAVES]);
    wait_for("all to be back", || effects(&lab.host) == whole);
    only.close();
    std::thread::sleep(SEVERAL_LOOKS);
    assert_same(&effects(&lab.host), &whole, "what is back in the files");
    // and the end takes along what is only kept
    lab.reload("all");
    let open = [2001, 2003].map(|port| lab.proxied(port, 39000 + port).expect("relayed"));
    rig.files("123\n", &[STAYS]);
    wait_for("the watch to follow", || {
        watch.log().matches("INFO reloaded").count() == 3
    });
    rig.end(watch);
    drop((open, relays));
    assert_same(&effects(&lab.host), &nothing, "the end");
}

#[test]
fn adding_by_hand_leaves_what_connections_use() {
    let rig = Rig::new();
    let lab = &rig.lab;
    let add = || {
        let output = lab.ctl("pathway add --all");
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    add();
    let relays = lab.run("--all");
    let mut open = vec![lab.proxied(2001, 38001).expect("relayed")];
    rig.files("123\n124\n", &[STAYS]);
    lab.reload("all");
    let said = add();
    assert!(
        said.contains("mark 123: no file wants 10.0.0.2 any more"),
        "{said}"
    );
    assert!(!rig.has_target(BEHIND), "nobody is there");
    talk(&mut open, Duration::from_millis(500));
    open.into_iter().for_each(Proxied::close);
    wait_for("the rule to go with the next run", || {
        add();
        !rig.has_target(OWN)
    });
    drop(relays);
}

#[test]
fn a_flow_of_datagrams_keeps_its_way_back() {
    let rig = Rig::new();
    let lab = &rig.lab;
    let services: Vec<_> = [OWN, "127.0.0.1"]
        .map(|at| crate::udp::lab::Service::echo(&lab.host, &format!("{at}:9005")))
        .into();
    let line = |target: &str| {
        format!("dns\t123\t127.0.0.1:2005\t{target}\t9005\t-\tprotocol=udp,idle-timeout=2s\n")
    };
    rig.files("123\n", &[&line(OWN)]);
    let running = lab.run("--all --manage-pathways");
    let proxy = lab
        .host
        .enter(|| UdpSocket::bind("127.0.0.1:0").expect("bind"));
    proxy
        .set_read_timeout(Some(Duration::from_secs(3)))
        .expect("read timeout");
    let to: SocketAddr = "127.0.0.1:2005".parse().expect("an address");
    let ask = |client: &str| {
        let datagram = [&announce(client)[..], b"hello"].concat();
        proxy.send_to(&datagram, to).expect("send");
        let mut answer = [0; 16];
        let length = proxy.recv(&mut answer).expect("an answer");
        assert_eq!(&answer[..length], b"hello");
    };
    ask("192.0.2.7:5000");
    let _ = services[0].next();
    rig.files("123\n", &[&line("127.0.0.1")]);
    lab.reload("all");
    let end = Instant::now() + SEVERAL_LOOKS;
    while Instant::now() < end {
        ask("192.0.2.7:5000");
        // where it began
        let _ = services[0].next();
        std::thread::sleep(Duration::from_millis(100));
    }
    ask("192.0.2.8:5000");
    let _ = services[1].next();
    assert!(rig.has_target(OWN));
    wait_for("the rule to go with the flow", || !rig.has_target(OWN));
    rig.end(running);
}
