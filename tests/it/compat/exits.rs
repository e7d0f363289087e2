//! How the process ends: as go-mmproxy where that was right, and otherwise so that a service manager knows.

use nix::sys::signal::Signal;

use crate::relay::lab::SOON;

use super::lab::Old;

#[test]
fn what_is_typed_wrong_is_a_usage_error() {
    let old = Old::new();
    for (line, said) in [
        ("go-mmproxy -nope", "unknown flag '-nope'"),
        ("go-mmproxy -mark", "-mark has no value"),
        ("go-mmproxy -p sctp", "expected tcp or udp"),
        ("go-mmproxy -l 224.0.0.1:80", "is multicast"),
        ("go-mmproxy -l :443", "where the relay itself listens"),
        ("go-mmproxy stray", "unexpected word 'stray'"),
    ] {
        old.assert_ends(line, 2, said);
    }
    for line in ["go-mmproxy -h", "mmproxy --help"] {
        old.assert_ends(line, 0, "-allowed-subnets");
    }
}

#[test]
fn an_allow_list_that_does_not_parse_is_fatal() {
    let old = Old::new();
    old.lab.wks.write("bad.txt", "10.0.0.0/24\nten dot zero\n");
    old.assert_ends(
        "go-mmproxy -allowed-subnets bad.txt -l 127.0.0.1:9",
        2,
        "bad.txt:2:1",
    );
    old.assert_ends(
        "go-mmproxy -allowed-subnets none.txt -l 127.0.0.1:9",
        2,
        "cannot read none.txt",
    );
    old.lab.wks.write("empty.txt", "# nobody\n");
    old.assert_ends(
        "go-mmproxy -allowed-subnets empty.txt -l 127.0.0.1:9",
        2,
        "the allow list is empty",
    );
}

#[test]
fn an_address_that_is_taken_is_exit_1() {
    let old = Old::new();
    let _taken = old
        .lab
        .wks
        .enter(|| std::net::TcpListener::bind("127.0.0.1:8443").expect("bind"));
    old.assert_ends("go-mmproxy -l 127.0.0.1:8443", 1, "in use");
    // the wildcard too, of which one family is free
    old.assert_ends("go-mmproxy -l :8443", 1, "in use");
}

#[test]
fn a_second_relay_on_the_address_is_exit_1() {
    let old = Old::new();
    let first = old.run("go-mmproxy -l 127.0.0.1:8443");
    let pid = first.pid().to_string();
    old.assert_ends("go-mmproxy -l 127.0.0.1:8443 -4 127.0.0.1:80", 1, &pid);
}

#[test]
fn a_listener_that_dies_is_exit_1() {
    let old = Old::new();
    let mut relay = old.run("go-mmproxy -l 127.0.0.1:8443");
    // the kernel destroys the listening socket: accept(2) fails from then on
    old.lab.wks.run("ss -K -t state listening sport = :8443");
    assert_eq!(relay.wait(SOON).code(), Some(1), "{}", relay.log());
}

#[test]
fn sigterm_is_exit_0() {
    let old = Old::new();
    let mut relay = old.run("go-mmproxy -l 127.0.0.1:8443");
    relay.signal(Signal::SIGTERM);
    assert_eq!(relay.wait(SOON).code(), Some(0), "{}", relay.log());
}
