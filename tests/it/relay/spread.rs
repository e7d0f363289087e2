//! Even shares for the workers, whatever the kernel's hash says.

use std::net::TcpStream;

use super::lab::{Lab, Relay, Service, exchange, settings};

fn shares(relay: &Relay) -> Vec<u64> {
    let counters = relay.server.counters();
    counters.iter().map(|of| of.active.get()).collect()
}

#[test]
fn few_long_connections_are_spread_evenly() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    for workers in [2, 3] {
        // the hash is seeded anew for each set of listeners: chance alone would not pass all of them
        for round in 0..4 {
            let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", workers, settings(&[service.addr]));
            let mut open: Vec<TcpStream> = Vec::new();
            for count in 1..=10 {
                let mut stream = lab.connect(&relay, &format!("192.0.2.7:{}", 4000 + count));
                exchange(&mut stream, b"hello");
                open.push(stream);
                if ![2, 3, 4, 10].contains(&count) {
                    continue;
                }
                let shares = shares(&relay);
                assert_eq!(shares.iter().sum::<u64>(), count);
                let even = count as f64 / workers as f64;
                for share in &shares {
                    assert!(
                        (*share as f64 - even).abs() <= 1.0,
                        "{count} connections on {workers} workers, round {round}: {shares:?}"
                    );
                }
            }
            for stream in &mut open {
                exchange(stream, b"still here");
            }
            drop(open);
            relay.wait("all closed", |totals| totals.active == 0);
            assert_eq!(relay.totals().accepted, 10);
            assert_eq!(relay.totals().relayed, 10);
        }
    }
}

/// Connections that arrive all at once, and a drain right behind them: each is served to its end.
#[test]
fn a_drain_loses_no_connection_on_its_way() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    for _ in 0..5 {
        let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 4, settings(&[service.addr]));
        let mut open: Vec<_> = (0..40)
            .map(|number| lab.connect(&relay, &format!("192.0.2.7:{}", 4000 + number)))
            .collect();
        relay.wait("accepted", |totals| totals.accepted == 40);
        relay.server.drain();
        for stream in &mut open {
            exchange(stream, b"still served");
        }
        drop(open);
        relay.wait("all closed", |totals| totals.active == 0);
    }
}
