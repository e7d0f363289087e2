//! Ranges of ports: which connection goes to which port, and what thousands of listeners cost.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Rig, addr, relayed};
use crate::relay::lab::{SOON, Service, announce};
use crate::support::net::{Running, wait_for};
use crate::udp::lab as udp;

impl Rig {
    fn dial(&self, to: &str) -> TcpStream {
        let to = addr(to);
        let stream = self
            .vps
            .enter(|| TcpStream::connect_timeout(&to, SOON))
            .expect("connect to the relay");
        stream.set_read_timeout(Some(SOON)).expect("read timeout");
        stream
    }
}

#[test]
fn each_port_goes_to_its_own() {
    let rig = Rig::new();
    let services: Vec<(SocketAddr, Service)> = [
        "127.0.0.1:20000",
        "127.0.0.1:20003",
        "127.0.0.1:20009",
        "[::1]:20003",
    ]
    .into_iter()
    .map(|at| (addr(at), Service::echo(&rig.wks, at)))
    .collect();
    let port = rig.service.addr.port();
    rig.instances(&format!(
        "many\t123\t10.0.0.1:10000-10009\t127.0.0.1\t20000-20009\t::1\n\
         six\t123\t[fd00::1]:10000-10009\t127.0.0.1\t20000-20009\t::1\n\
         one\t123\t10.0.0.1:11000-11001\t127.0.0.1\t{port}\t-\n"
    ));
    let relay = rig.run_with("--metrics 127.0.0.1:9464");
    relay.wait_log(
        "relaying instance=many listen=10.0.0.1:10000-10009 mark=123 target4=127.0.0.1:20000-20009 \
         target6=[::1]:20000-20009 ",
    );
    let at = |at: &str| {
        let at = addr(at);
        &services
            .iter()
            .find(|(addr, _)| *addr == at)
            .expect("a service")
            .1
    };
    let mut open = Vec::new();
    for (to, client, service) in [
        ("10.0.0.1:10000", "192.0.2.7:4000", at("127.0.0.1:20000")),
        ("10.0.0.1:10003", "192.0.2.7:4001", at("127.0.0.1:20003")),
        ("10.0.0.1:10009", "192.0.2.7:4002", at("127.0.0.1:20009")),
        ("10.0.0.1:10003", "[2001:db8::7]:4003", at("[::1]:20003")),
        ("[fd00::1]:10003", "[2001:db8::7]:4004", at("[::1]:20003")),
        ("[fd00::1]:10000", "192.0.2.7:4005", at("127.0.0.1:20000")),
        ("10.0.0.1:11000", "192.0.2.7:4006", &rig.service),
        ("10.0.0.1:11001", "192.0.2.7:4007", &rig.service),
    ] {
        let mut stream = rig.dial(to);
        relayed(&mut stream, &announce(client));
        assert_eq!(service.peer(), addr(client), "{to}");
        let conns = rig.conns();
        let mine = conns.iter().find(|one| one["client"] == client);
        let mine = mine.unwrap_or_else(|| panic!("{client} in {conns:#?}"));
        assert_eq!(mine["port"], addr(to).port(), "{mine:#}");
        assert_eq!(mine["target"], *service.addr.to_string(), "{mine:#}");
        open.push(stream);
    }
    // nobody listens behind this one: the message names the port that was tried
    let mut refused = rig.dial("10.0.0.1:10007");
    refused
        .write_all(&announce("192.0.2.7:4010"))
        .expect("send");
    let _ = refused.read(&mut [0; 8]);
    relay.wait_log("the service at 127.0.0.1:20007 is down");
    let status: Value = serde_json::from_str(&rig.said("status --json")).expect("JSON");
    let many = &status[0]["instances"][0];
    assert_eq!(many["listen"], "10.0.0.1:10000-10009");
    assert_eq!(many["targets"][0], "127.0.0.1:20000-20009");
    assert_eq!(many["targets"][1], "[::1]:20000-20009");
    let came = |port: u16, accepted: u64| serde_json::json!({"port": port, "accepted": accepted});
    let expected = [
        came(10000, 1),
        came(10003, 2),
        came(10007, 1),
        came(10009, 1),
    ];
    assert_eq!(many["ports"], Value::from(expected.to_vec()));
    let metrics = rig.wks.run("curl -s http://127.0.0.1:9464/metrics");
    let line = "mmproxy_port_connections_total{instance=\"many\",port=\"10003\"} 2";
    assert!(metrics.contains(line), "{metrics}");
    assert!(rig.said("status many").contains("2 at 10003"));
}

#[test]
fn datagrams_too_and_the_answer_comes_from_the_port_that_was_asked() {
    let rig = Rig::new();
    let services =
        [30000, 30001].map(|port| udp::Service::echo(&rig.wks, &format!("127.0.0.1:{port}")));
    rig.instances("dns\t123\t10.0.0.1:5000-5001\t127.0.0.1\t30000-30001\t-\tprotocol=udp\n");
    let _relay = rig.run();
    // one socket of the proxy, and the same client: only the port tells the flows apart
    let proxy = rig
        .vps
        .enter(|| UdpSocket::bind("10.0.0.2:4444"))
        .expect("bind");
    proxy.set_read_timeout(Some(SOON)).expect("read timeout");
    for round in 0..3 {
        for (to, service) in [
            ("10.0.0.1:5000", &services[0]),
            ("10.0.0.1:5001", &services[1]),
        ] {
            let payload = format!("{round} to {to}");
            let datagram = [&udp::announce("192.0.2.7:4000")[..], payload.as_bytes()].concat();
            proxy.send_to(&datagram, to).expect("send");
            let mut answer = [0; 100];
            let (length, from) = proxy.recv_from(&mut answer).expect("an answer");
            assert_eq!((&answer[..length], from), (payload.as_bytes(), addr(to)));
            assert_eq!(
                service.peer_of(payload.as_bytes()).ip(),
                addr("192.0.2.7:0").ip()
            );
        }
    }
    let conns = rig.conns();
    let mut ports: Vec<_> = conns
        .iter()
        .filter_map(|one| one["port"].as_u64())
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [5000, 5001], "{conns:#?}");
}

/// A figure of /proc/PID/status in kB.
fn status_of(running: &Running, figure: &str) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("status");
    let line = status
        .lines()
        .find(|line| line.starts_with(figure))
        .expect(figure);
    line.split_whitespace()
        .nth(1)
        .and_then(|kb| kb.parse().ok())
        .expect("a number")
}

fn descriptors_of(running: &Running) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", running.pid()))
        .expect("descriptors")
        .count()
}

/// How long a process takes to be ready, and its memory in kB and descriptors then.
fn cost(rig: &Rig, lines: &str) -> (Duration, u64, usize, Running) {
    rig.instances(lines);
    let began = Instant::now();
    let running = rig.run();
    let took = began.elapsed();
    let memory = status_of(&running, "RssAnon");
    let descriptors = descriptors_of(&running);
    (took, memory, descriptors, running)
}

fn a_connection_works(rig: &Rig, to: &str, client: &str) {
    relayed(rig.dial(to), &announce(client));
    assert_eq!(rig.service.peer(), addr(client));
}

/// Both protocols, 4,000 ports each; what it costs is printed, and bounded by what the README says.
#[test]
fn thousands_of_listeners_are_cheap() {
    let rig = Rig::new();
    let port = rig.service.addr.port();
    let (_, idle, few, running) = cost(
        &rig,
        &format!("one\t123\t10.0.0.1:9\t127.0.0.1\t{port}\t-\n"),
    );
    stop(&rig, running);
    let range = "10.0.0.1:10000-13999\t127.0.0.1";
    for (options, most) in [("", 2.5), ("protocol=udp", 2.5)] {
        let (took, memory, descriptors, running) =
            cost(&rig, &format!("many\t123\t{range}\t{port}\t-\t{options}\n"));
        let each = (memory.saturating_sub(idle)) as f64 / 4000.0;
        println!(
            "4,000 listeners {options}: ready after {took:?}, {each:.2} kB each, {descriptors} descriptors"
        );
        assert!(each < most, "{options}: {each:.2} kB a listener");
        assert!(descriptors < 4000 + few + 16, "{options}: {descriptors}");
        assert!(took < Duration::from_secs(10), "{options}: {took:?}");
        if options.is_empty() {
            a_connection_works(&rig, "10.0.0.1:10000", "192.0.2.7:4000");
            a_connection_works(&rig, "10.0.0.1:13999", "192.0.2.7:4001");
            // all of them go to the successor
            rig.said("upgrade");
            running.wait_log("handed over");
            a_connection_works(&rig, "10.0.0.1:12345", "192.0.2.7:4002");
        }
        stop(&rig, running);
    }
}

/// Ends every process of this host.
fn stop(rig: &Rig, mut running: Running) {
    running.signal(Signal::SIGTERM);
    running.wait(SOON);
    // a successor is nobody's child
    let output = rig.ctl("status --json");
    let left: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    for process in left.as_array().into_iter().flatten() {
        let pid = process["pid"].as_i64().expect("a pid");
        let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("stop the successor");
    }
    wait_for("every process to end", || {
        !rig.ctl("status --json").status.success()
    });
}
