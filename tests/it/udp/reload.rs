//! `mmproxyctl reload` of UDP instances: what changes reaches new flows, and those that are there stay.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cells::{done, run};
use super::lab::{Proxy, Service, addr, wait_sockets_to};
use super::run::{PORT, Rig, descriptors, line};
use crate::support::net::{Host, wait_for};

const FIRST: &str = ",udp-header=first";

/// It reaches what begins from then on, and loses nothing that is there.
#[test]
fn a_reload_keeps_the_flows() {
    let rig = Rig::new(",udp-header=first");
    let relay = rig.start();
    let old = rig.proxy();
    old.exchange("203.0.113.7:4000", b"before");
    rig.service.peer_of(b"before");
    let moved = Service::echo(&rig.wks, "127.0.0.1:0");
    rig.instance(&moved, ",udp-header=first");
    done(&rig.wks, "reload echo");
    old.send(&[b"as before"]);
    assert_eq!(old.answer(), b"as before");
    assert_eq!(rig.service.peer_of(b"as before"), addr("203.0.113.7:4000"));
    let new = rig.proxy();
    new.exchange("203.0.113.8:4000", b"elsewhere");
    assert_eq!(moved.peer_of(b"elsewhere"), addr("203.0.113.8:4000"));
    // a proxy that is no longer believed is not, also where it has flows
    rig.wks.write("etc/allow.txt", "10.0.0.99\n");
    done(&rig.wks, "reload echo");
    old.send(&[b"not any more"]);
    relay.wait_log("not on the allow list");
    rig.service.assert_nothing_more();
    old.assert_nothing_more();
}

/// A relay on other sockets would not know whose the flows are that go on without a header.
#[test]
fn a_reload_with_other_listeners_keeps_the_flows() {
    let rig = Rig::new(",udp-header=first");
    let _relay = rig.start();
    let proxy = rig.proxy();
    proxy.exchange("203.0.113.7:4000", b"before");
    rig.service.peer_of(b"before");
    rig.instance(&rig.service, ",udp-header=first,listeners=5");
    let said = done(&rig.wks, "reload echo");
    assert!(said.contains("changed: echo"), "{said}");
    assert!(said.contains("listeners on 10.0.0.1:5300 until"), "{said}");
    proxy.send(&[b"as before"]);
    assert_eq!(proxy.answer(), b"as before");
    assert_eq!(rig.service.peer_of(b"as before"), addr("203.0.113.7:4000"));
}

impl Rig {
    fn proxy_to(&self, port: u16) -> Proxy {
        Proxy::new(&self.vps, addr(&format!("10.0.0.1:{port}")))
    }

    /// Has the running process take these lines.
    fn reload(&self, lines: &str) -> String {
        self.wks.write("etc/instances.tsv", lines);
        done(&self.wks, "reload")
    }
}

/// Whether anybody listens on a port.
fn is_bound(host: &Host, port: u16) -> bool {
    !host.run(&format!("ss -Hlun sport = :{port}")).is_empty()
}

/// The flows of a port that stays go on without a header; those of one that goes get the answers they wait for.
#[test]
fn a_reload_with_other_ports_keeps_the_flows() {
    let rig = Rig::new("");
    let with = |listen: &str| line("echo", listen, &rig.service, FIRST);
    rig.wks
        .write("etc/instances.tsv", with("10.0.0.1:5300-5301"));
    let relay = run(&rig.wks, "run echo", &[PORT, 5301]);
    let (goes, stays) = (rig.proxy(), rig.proxy_to(5301));
    goes.exchange("203.0.113.7:4000", b"before");
    stays.exchange("203.0.113.8:4000", b"before");
    rig.service.forget();
    let said = rig.reload(&with("10.0.0.1:5301-5303"));
    assert!(said.contains("changed: echo"), "{said}");
    relay.wait_log("flows stay");
    rig.service.say(addr("203.0.113.7:4000"), b"late");
    assert_eq!(goes.answer(), b"late");
    for payload in [&b"as before"[..], b"and on"] {
        stays.send(&[payload]);
        assert_eq!(stays.answer(), payload);
        assert_eq!(rig.service.peer_of(payload), addr("203.0.113.8:4000"));
    }
    rig.proxy_to(5303).exchange("203.0.113.9:4000", b"new");
    assert_eq!(rig.service.peer_of(b"new"), addr("203.0.113.9:4000"));
    wait_sockets_to(&rig.wks, rig.service.addr, 2);
    wait_for("the port to be free", || !is_bound(&rig.wks, PORT));
    let status = done(&rig.wks, "status --json");
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let datagrams = &status[0]["instances"][0]["datagrams"];
    assert_eq!(datagrams["ended"]["drained"], 1, "{status:#}");
    assert_eq!(datagrams["flows_opened"], 3, "{status:#}");
    stays.send(&[b"still"]);
    assert_eq!(stays.answer(), b"still");
}

/// Neither what is asked meanwhile is lost, nor does anything stay of ports that come and go.
#[test]
fn ports_come_and_go_under_traffic() {
    let rig = Rig::new("");
    let with = |listen: &str| line("echo", listen, &rig.service, FIRST);
    rig.wks.write("etc/instances.tsv", with("10.0.0.1:5300"));
    let relay = run(&rig.wks, "run echo", &[PORT]);
    let proxy = rig.proxy();
    proxy.exchange("203.0.113.7:4000", b"before");
    let before = descriptors(&relay);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0u32.. {
                proxy.send(&[&number.to_be_bytes()]);
                assert_eq!(proxy.answer(), number.to_be_bytes());
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for round in 0..20 {
            rig.reload(&with(match round % 2 {
                0 => "10.0.0.1:5299-5310",
                _ => "10.0.0.1:5300",
            }));
        }
        over.store(true, Ordering::Relaxed);
    });
    wait_for("the other ports to be free", || !is_bound(&rig.wks, 5310));
    wait_for("their descriptors", || descriptors(&relay) == before);
}

/// Two instances change places: what is sent to a port is at once for the one that has it now.
#[test]
fn instances_change_places() {
    let rig = Rig::new("");
    let other = Service::echo(&rig.wks, "127.0.0.1:0");
    let lines =
        |one: &str, two: &str| line("one", one, &rig.service, "") + &line("two", two, &other, "");
    rig.wks
        .write("etc/instances.tsv", lines("10.0.0.1:5300", "10.0.0.1:5301"));
    let _relay = run(&rig.wks, "run --all", &[PORT, 5301]);
    rig.proxy().exchange("203.0.113.7:4000", b"to one");
    assert_eq!(rig.service.next().bytes, b"to one");
    rig.reload(&lines("10.0.0.1:5301", "10.0.0.1:5300"));
    for port in 4000..4020 {
        let client = |number: u8| format!("203.0.113.{number}:{port}");
        rig.proxy().exchange(&client(8), b"to two");
        assert_eq!(other.peer_of(b"to two"), addr(&client(8)));
        rig.proxy_to(5301).exchange(&client(9), b"to one");
        assert_eq!(rig.service.peer_of(b"to one"), addr(&client(9)));
    }
}

/// Where a port is taken, the relay starts anew as soon as it can, as any relay does.
#[test]
fn a_port_that_is_taken_is_said_and_waited_for() {
    let rig = Rig::new("");
    let with = |listen: &str| line("echo", listen, &rig.service, FIRST);
    rig.wks.write("etc/instances.tsv", with("10.0.0.1:5300"));
    let relay = run(&rig.wks, "run echo", &[PORT]);
    rig.proxy().exchange("203.0.113.7:4000", b"before");
    let taken = rig
        .wks
        .enter(|| UdpSocket::bind("10.0.0.1:5301").expect("bind"));
    rig.wks
        .write("etc/instances.tsv", with("10.0.0.1:5300-5301"));
    let output = rig.wks.mmproxyctl("reload").output().expect("mmproxyctl");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("not running: echo"), "{output:?}");
    assert!(said.contains("10.0.0.1:5301"), "{output:?}");
    relay.wait_log("without the flows");
    drop(taken);
    wait_for("the relay", || is_bound(&rig.wks, 5301));
    rig.proxy_to(5301).exchange("203.0.113.7:4000", b"at last");
}
