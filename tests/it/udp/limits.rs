//! How flows end, and how many there may be.

use std::num::NonZeroU32;
use std::time::Duration;

use mmproxyctl::model::UdpHeader::{Every, First};
use mmproxyctl::relay::counters::ConnectFailure;
use mmproxyctl::relay::udp::Settings;
use mmproxyctl::relay::udp::counters::{Dropped, Ended};

use super::lab::{Proxy, Relay, Service, addr, announce, settings, sockets_to, wait_sockets_to};
use crate::relay::lab::Lab;
use crate::support::net::wait_for;

fn number(value: u32) -> NonZeroU32 {
    NonZeroU32::new(value).expect("not zero")
}

#[test]
fn silence_in_both_directions_ends_a_flow() {
    let lab = Lab::new();
    let service = Service::silent(&lab.wks, "127.0.0.1:0");
    let settings = Settings {
        idle_timeout: Duration::from_millis(400),
        ..settings(Every, &[service.addr])
    };
    let relay = Relay::start(&lab.wks, settings);
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.send(&[&announce("192.0.2.7:4000"), b"silent"]);
    proxy.send(&[&announce("192.0.2.7:4001"), b"asks on"]);
    proxy.send(&[&announce("192.0.2.7:4002"), b"is talked to"]);
    service.next();
    service.next();
    let talked_to = service.next().peer;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(100));
        proxy.send(&[&announce("192.0.2.7:4001"), b"asks on"]);
        service.say(talked_to, b"more");
        assert_eq!(proxy.answer(), b"more");
    }
    let totals = relay.totals();
    assert_eq!(totals.ended.of(Ended::Idle), 1);
    assert_eq!(totals.flows_unanswered, 1);
    assert_eq!(totals.flows, 2);
    wait_sockets_to(&lab.wks, service.addr, 2);
    let sockets = sockets_to(&lab.wks, service.addr);
    assert!(
        !sockets.contains("192.0.2.7:4000")
            && sockets.contains("192.0.2.7:4001")
            && sockets.contains("192.0.2.7:4002"),
        "{sockets}"
    );
    relay.wait("the end of all", |totals| totals.flows == 0);
    wait_sockets_to(&lab.wks, service.addr, 0);
}

/// Another idle timeout is for the flows that are there, too, also while nothing comes.
#[test]
fn a_new_idle_timeout_reaches_silent_flows() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let with = |idle_timeout| Settings {
        idle_timeout,
        ..settings(Every, &[service.addr])
    };
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(600));
    let relay = Relay::start(&lab.wks, with(short));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("192.0.2.7:4000", b"hello");
    relay.server.set(with(long));
    std::thread::sleep(2 * short);
    assert_eq!(relay.totals().flows, 1, "ended by the old timeout");
    relay.server.set(with(short));
    relay.wait("the end by the new timeout", |totals| totals.flows == 0);
    assert_eq!(relay.totals().ended.of(Ended::Idle), 1);
}

#[test]
fn the_oldest_flow_makes_room() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let settings = Settings {
        max_flows: number(3),
        ..settings(Every, &[service.addr])
    };
    let relay = Relay::start(&lab.wks, settings);
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for client in [1, 2, 3, 1, 4, 5] {
        proxy.exchange(&format!("192.0.2.{client}:4000"), b"hello");
        // the order of use is as exact as 16 ms
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(relay.totals().ended.of(Ended::MaxFlows), 2);
    assert_eq!(relay.totals().flows, 3);
    wait_sockets_to(&lab.wks, service.addr, 3);
    let sockets = sockets_to(&lab.wks, service.addr);
    for client in [1, 4, 5] {
        assert!(
            sockets.contains(&format!("192.0.2.{client}:4000")),
            "{sockets}"
        );
    }
}

/// One proxy's flood of clients costs its own oldest flows, nobody else's.
#[test]
fn a_flood_through_one_proxy_leaves_the_others_alone() {
    for (workers, mode) in [(1, Every), (4, Every), (4, First)] {
        let lab = Lab::new();
        lab.vps.address("eth0", "10.0.0.3/24");
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let settings = Settings {
            max_flows: number(60),
            max_flows_per_proxy: number(40),
            ..settings(mode, &[service.addr])
        };
        let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", workers, settings);
        let quiet: Vec<_> = (0..10)
            .map(|number| {
                let proxy = Proxy::from(&lab.vps, addr("10.0.0.3:0"), relay.addr);
                let client = format!("198.51.100.{number}:4000");
                proxy.exchange(&client, b"hello");
                service.next();
                (proxy, client)
            })
            .collect();
        let flood: Vec<_> = (0..20)
            .map(|_| Proxy::from(&lab.vps, addr("10.0.0.2:0"), relay.addr))
            .collect();
        for client in 0..500u16 {
            let client = format!("192.0.{}.{}:4000", client / 250, client % 250);
            // a header alone, on another port than the datagram that follows
            flood[client.len() % 20].send(&[&announce(&client)]);
            let proxy = &flood[client.bytes().map(usize::from).sum::<usize>() % 20];
            proxy.exchange(&client, b"flood");
            service.next();
        }
        let totals = relay.totals();
        // the workers that are asked for room by the others give it a moment later
        relay.wait("the limit", |totals| totals.flows <= 50);
        assert!(
            totals.ended.of(Ended::MaxFlowsPerProxy) > 0 || mode == First,
            "{totals:#?}"
        );
        assert_eq!(totals.ended.of(Ended::MaxFlows), 0);
        for (proxy, client) in &quiet {
            match mode {
                First => proxy.send(&[b"still here"]),
                _ => proxy.send(&[&announce(client), b"still here"]),
            }
            assert_eq!(proxy.answer(), b"still here");
            assert_eq!(service.peer_of(b"still here"), addr(client));
        }
        wait_for("the limit among the sockets", || {
            sockets_to(&lab.wks, service.addr).lines().count() <= 50
        });
    }
}

#[test]
fn a_service_that_is_down_ends_the_flow() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let target = service.addr;
    let relay = Relay::start(&lab.wks, settings(Every, &[target]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("192.0.2.7:4000", b"hello");
    drop(service);
    for round in 1..=3 {
        relay.wait("the ICMP", |totals| {
            proxy.send(&[&announce("192.0.2.7:4000"), b"anybody?"]);
            totals.ended.of(Ended::ServiceDown) >= round
        });
    }
    relay.wait("the end of all", |totals| totals.flows == 0);
    let down = relay.totals().open_failed.of(ConnectFailure::ServiceDown);
    assert!(down >= 3, "{down}");
    wait_sockets_to(&lab.wks, target, 0);
    let back = Service::echo(&lab.wks, &target.to_string());
    proxy.exchange("192.0.2.7:4000", b"back");
    assert_eq!(back.peer_of(b"back"), addr("192.0.2.7:4000"));
    assert_eq!(relay.totals().dropped.of(Dropped::NoFlow), 0);
    wait_for("one flow", || relay.totals().flows == 1);
}
