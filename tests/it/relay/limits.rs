//! Limits, failures to connect, starting and ending.

use std::io::Write;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use mmproxyctl::model::ListenAddr;
use mmproxyctl::relay::counters::{ConnectFailure, Refusal};
use mmproxyctl::relay::settings::Settings;
use mmproxyctl::relay::tcp::{Error, Server};
use mmproxyctl::relay::workers::Workers;
use mmproxyctl::socket;
use socket2::SockRef;

use super::lab::{Lab, Relay, SOON, Service, assert_closed, exchange, settings};
use crate::support::net::{Host, wait_for};

/// Waits for the end of a server.
fn ended(server: &Server) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime
        .block_on(async { tokio::time::timeout(SOON, server.ended()).await })
        .expect("the workers ended")
}

#[test]
fn max_connections_holds_and_frees() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start_at(
        &lab.wks,
        "10.0.0.1:0",
        2,
        Settings {
            max_connections: NonZeroU32::new(2),
            ..settings(&[service.addr])
        },
    );
    let mut one = lab.connect(&relay, "192.0.2.7:4000");
    exchange(&mut one, b"hello");
    let mut two = lab.connect(&relay, "192.0.2.7:4001");
    exchange(&mut two, b"hello");
    lab.assert_refused(&relay, b"", "one too many");
    relay.wait_refused(Refusal::TooManyConnections, 1);
    drop(one);
    relay.wait("one closed", |totals| totals.active == 1);
    let mut four = lab.connect(&relay, "192.0.2.7:4003");
    exchange(&mut four, b"hello");
    exchange(&mut two, b"unharmed");
}

#[test]
fn connections_without_a_header_are_limited() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(
        &lab.wks,
        Settings {
            max_waiting: NonZeroU32::new(3).unwrap(),
            ..settings(&[service.addr])
        },
    );
    let silent: Vec<_> = (0..3).map(|_| lab.dial(relay.addr)).collect();
    relay.wait("waiting", |totals| totals.waiting == 3);
    lab.assert_refused(&relay, b"", "one too many without a header");
    relay.wait_refused(Refusal::TooManyWaiting, 1);
    drop(silent);
    relay.wait("gone", |totals| totals.waiting == 0);
    service.assert_only(&lab, &relay, "192.0.2.7:4000");
}

#[test]
fn a_service_that_is_down_is_no_timeout() {
    let lab = Lab::new();
    let down = Service::echo(&lab.wks, "127.0.0.1:0").addr;
    let relay = Relay::start(&lab.wks, settings(&[down]));
    for (payload, times) in [(&b""[..], 1), (b"hello", 2)] {
        let mut stream = lab.connect(&relay, "192.0.2.7:4000");
        let _ = stream.write_all(payload);
        assert_closed(&mut stream, "service down");
        relay.wait("counted", |totals| {
            totals.connect_failed.of(ConnectFailure::ServiceDown) == times
        });
    }
    assert_eq!(relay.totals().connect_failed.all(), 2);
}

#[test]
fn without_the_pathway_a_connect_times_out() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    for rule in [
        "rule del priority 100",
        "rule del priority 200",
        "-6 rule del priority 100",
    ] {
        lab.wks.ip(rule);
    }
    let relay = Relay::start(
        &lab.wks,
        Settings {
            connect_timeout: Duration::from_millis(200),
            ..settings(&[service.addr])
        },
    );
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    assert_closed(&mut stream, "no pathway");
    relay.wait("counted", |totals| {
        totals.connect_failed.of(ConnectFailure::TimedOut) == 1 && totals.active == 0
    });
}

/// A drain lets open connections finish and takes no new ones; an end cuts them.
#[test]
fn drain_then_end() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let mut relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(&[service.addr]));
    let mut finishes = lab.connect(&relay, "192.0.2.7:4000");
    exchange(&mut finishes, b"hello");
    let mut stays = lab.connect(&relay, "192.0.2.7:4001");
    exchange(&mut stays, b"hello");
    relay.server.drain();
    let refused = || !lab.vps.can_connect(relay.addr.ip(), relay.addr.port());
    wait_for("the listeners closed", refused);
    exchange(&mut finishes, b"still served");
    drop(finishes);
    relay.wait("one closed", |totals| totals.active == 1);
    exchange(&mut stays, b"still served");
    relay.end();
    assert_closed(&mut stays, "cut");
    assert_eq!(relay.totals().active, 0);
}

/// A drain with nothing open ends at once.
#[test]
fn an_idle_relay_drains_at_once() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    relay.server.drain();
    ended(&relay.server).unwrap();
}

/// A listener that breaks ends the relay with an error: better started anew than deaf.
#[test]
fn a_dead_listener_is_an_error() {
    let lab = Lab::new();
    let settings = settings(&["127.0.0.1:1".parse().unwrap()]);
    let (_workers, server, listener) = lab.wks.enter(|| {
        let addr = ListenAddr::new("10.0.0.1:0".parse().unwrap());
        let listeners = socket::tcp_listeners(addr, NonZeroUsize::MIN).unwrap();
        let listener = listeners.sockets[0].try_clone().unwrap();
        let workers = Workers::start(NonZeroUsize::MIN).unwrap();
        let server = Server::start(&workers, listeners.sockets, settings).unwrap();
        (workers, server, listener)
    });
    // what the kernel does to a listener that is destroyed from outside (ss --kill)
    SockRef::from(&listener)
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    let error = ended(&server).unwrap_err();
    assert!(matches!(error, Error::Listener { .. }), "{error}");
}

/// As many listeners as asked for share the address; nobody else gets in between.
#[test]
fn listeners_share_an_address_with_nobody_else() {
    let host = Host::new("wks01");
    host.enter(|| {
        let listen = |addr: &str, count| {
            socket::tcp_listeners(
                ListenAddr::new(addr.parse().unwrap()),
                NonZeroUsize::new(count).unwrap(),
            )
        };
        let four = listen("127.0.0.1:0", 4).unwrap();
        assert!(!four.address_missing);
        let addr = four.sockets[0].local_addr().unwrap();
        assert_eq!(four.sockets.len(), 4);
        assert!(
            four.sockets
                .iter()
                .all(|socket| socket.local_addr().unwrap() == addr)
        );
        let error = listen(&addr.to_string(), 1).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::EADDRINUSE));
        assert!(error.to_string().contains(&addr.to_string()));
    });
}

/// An address that comes later: listening already, and connections arrive.
#[test]
fn a_listen_address_that_is_not_there_yet() {
    let lab = Lab::new();
    for (listen, prefix, interface) in [
        ("100.64.0.1:2222", "100.64.0.1/32", "v4"),
        ("[fd64::1]:2222", "fd64::1/128", "v6"),
    ] {
        let listeners = lab
            .wks
            .enter(|| {
                socket::tcp_listeners(ListenAddr::new(listen.parse().unwrap()), NonZeroUsize::MIN)
            })
            .unwrap();
        assert!(listeners.address_missing, "{interface}");
        lab.wks.address("eth0", prefix);
        let family = if interface == "v6" { "-6 " } else { "" };
        let gateway = if interface == "v6" {
            "fd00::1"
        } else {
            "10.0.0.1"
        };
        lab.vps
            .ip(&format!("{family}route add {prefix} via {gateway}"));
        let stream = lab.dial(listen.parse().unwrap());
        drop((stream, listeners));
    }
}
