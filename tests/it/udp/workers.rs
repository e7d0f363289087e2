//! Several workers: the kernel deals datagrams out by a hash, and the relay is right whatever it says.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use mmproxyctl::model::ListenAddr;
use mmproxyctl::model::UdpHeader::{self, Every, First};
use mmproxyctl::relay::udp::counters::Totals;
use mmproxyctl::socket::udp::udp_listeners;
use socket2::{Domain, Socket, Type};

use super::lab::{Proxy, Relay, Service, addr, announce, settings};
use crate::relay::lab::{Lab, SOON};
use crate::support::net::{Host, wait_for};

#[test]
fn flows_are_dealt_out_and_all_are_right() {
    for mode in [Every, First] {
        let lab = Lab::new();
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 4, settings(mode, &[service.addr]));
        let proxies: Vec<_> = (0..64u16)
            .map(|number| {
                (
                    format!("192.0.2.7:{}", 4000 + number),
                    Proxy::new(&lab.vps, relay.addr),
                )
            })
            .collect();
        for _ in 0..3 {
            for (client, proxy) in &proxies {
                proxy.exchange(client, client.as_bytes());
                assert_eq!(service.peer_of(client.as_bytes()), addr(client));
            }
        }
        let busy = |totals: Totals| totals.flows_opened > 0;
        let workers = relay.server.counters().iter();
        assert!(workers.filter(|worker| busy(worker.read())).count() > 1);
        assert_eq!(relay.totals().flows, 64);
        assert_eq!(relay.totals().flows_adopted, 0);
    }
}

/// A listener beside others at the same address.
pub(super) fn listener(host: &Host, at: &str) -> UdpSocket {
    host.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
        socket.set_reuse_port(true).expect("SO_REUSEPORT");
        socket.bind(&addr(at).into()).expect("bind");
        socket.into()
    })
}

/// The number of listeners changes while flows go on: half of them come to another worker, which knows
/// nothing of them, and with `first` not even whose they are.
#[test]
fn a_flow_that_comes_to_another_worker_goes_on() {
    const FLOWS: u16 = 64;
    for mode in [Every, First] {
        let lab = Lab::new();
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let one = listener(&lab.wks, "10.0.0.1:7000");
        let proxies: Vec<_> = (0..FLOWS)
            .map(|number| {
                let proxy = Proxy::new(&lab.vps, one.local_addr().unwrap());
                let client = format!("192.0.2.7:{}", 4000 + number);
                proxy.send(&[&announce(&client), b"queued at the first"]);
                (client, proxy)
            })
            .collect();
        wait_for("the datagrams in the first listener's queue", || {
            let queued = lab.wks.run("ss -Huan sport = :7000");
            let queued = queued.split_whitespace().nth(1).map(str::parse::<u64>);
            // the kernel's unit of accounting for a small datagram
            matches!(queued, Some(Ok(bytes)) if bytes >= 768 * u64::from(FLOWS))
        });
        let two = listener(&lab.wks, "10.0.0.1:7000");
        let relay = Relay::start_on(&lab.wks, vec![one, two], settings(mode, &[service.addr]));
        for (_, proxy) in &proxies {
            assert_eq!(proxy.answer(), b"queued at the first");
            service.next();
        }
        for round in 0..3 {
            for (client, proxy) in &proxies {
                let payload = format!("{client} in round {round}").into_bytes();
                match mode {
                    UdpHeader::First => proxy.send(&[&payload]),
                    _ => proxy.send(&[&announce(client), &payload]),
                }
                assert_eq!(proxy.answer(), payload);
                assert_eq!(service.peer_of(&payload), addr(client));
            }
        }
        let totals = relay.totals();
        assert_eq!(totals.flows_opened, u64::from(FLOWS));
        assert!(totals.flows_adopted > 0, "{totals:#?}");
        assert_eq!(totals.ports_given_up + totals.dropped.all(), 0);
        relay.wait("each flow once", |totals| totals.flows == u64::from(FLOWS));
        for (_, proxy) in &proxies {
            proxy.assert_nothing_more();
        }
    }
}

/// A flow that no datagram comes for any more is given up by the worker that had it, also when it has
/// nothing else to do.
#[test]
fn a_drain_ends_when_nothing_is_awaited() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let silent = Service::silent(&lab.wks, "127.0.0.1:0");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for (service, quick) in [(&service, true), (&silent, false)] {
        let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(Every, &[service.addr]));
        let proxy = Proxy::new(&lab.vps, relay.addr);
        proxy.send(&[&announce("192.0.2.7:4000"), b"hello"]);
        service.peer_of(b"hello");
        if quick {
            assert_eq!(proxy.answer(), b"hello");
        }
        let start = std::time::Instant::now();
        relay.server.drain();
        runtime.block_on(relay.server.ended()).unwrap();
        let took = start.elapsed().as_millis();
        assert_eq!(took < 500, quick, "{took} ms");
        assert!(took < 3_000, "{took} ms");
    }
}

/// A second program on the same address would silently get half of the datagrams.
#[test]
fn an_address_that_somebody_has_is_not_shared() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(Every, &[service.addr]));
    let again = lab.wks.enter(|| {
        udp_listeners(
            ListenAddr::new(relay.addr),
            std::num::NonZeroUsize::new(2).unwrap(),
        )
    });
    let error = again.unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EADDRINUSE));
}

/// Whoever sends without a pause keeps no relay from ending.
#[test]
fn a_drain_ends_while_datagrams_come() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxies = [(); 2].map(|()| Proxy::new(&lab.vps, relay.addr));
    let stop = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        for (proxy, client) in proxies.iter().zip(["192.0.2.7:4000", "192.0.2.8:4000"]) {
            let stop = &stop;
            scope.spawn(move || {
                let datagram = [&*announce(client), &[0; 64]].concat();
                // each of another size than the one before: none can be sent together with others
                for number in 0.. {
                    // refused once nobody listens any more
                    let _ = proxy.socket.send(&datagram[..datagram.len() - number % 7]);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        relay.wait("the flood", |totals| totals.datagrams_to_target > 10_000);
        relay.server.drain();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let ended = runtime.block_on(async {
            let ended = relay.server.ended();
            tokio::time::timeout(SOON, ended).await
        });
        stop.store(true, Ordering::Relaxed);
        ended
    });
    ended.expect("its end").expect("no error");
}
