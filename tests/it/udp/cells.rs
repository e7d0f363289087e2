//! Every kind of target, both families, over UDP: the pathway as `pathway add` makes it, the relay as a
//! process, asked with `probe --udp`.

use std::io::Write;
use std::process::{Output, Stdio};

use super::lab::{Service, addr};
use crate::support::net::{Host, Running, wait_for};

const CLIENTS: [&str; 2] = ["203.0.113.7", "[2001:db8:7::7]"];

/// Runs `probe` with these bytes on stdin.
pub(super) fn probe(host: &Host, words: &str, stdin: &[u8]) -> Output {
    let mut child = host
        .mmproxyctl(&format!("probe {words} --udp"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start mmproxyctl");
    let mut pipe = child.stdin.take().expect("a pipe");
    pipe.write_all(stdin).expect("write to probe");
    drop(pipe);
    child.wait_with_output().expect("wait for mmproxyctl")
}

/// Runs mmproxyctl and fails unless it succeeds; what it wrote to stdout.
pub(super) fn done(host: &Host, words: &str) -> String {
    let output = host.mmproxyctl(words).output().expect("mmproxyctl");
    assert!(output.status.success(), "{words}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs the relays of a host and waits until they listen on these UDP ports.
pub(super) fn run(host: &Host, words: &str, ports: &[u16]) -> Running {
    let running = host.spawn(host.mmproxyctl(words));
    for port in ports {
        let filter = format!("ss -Hlun sport = :{port}");
        wait_for(&format!("port {port}:\n{}", running.log()), || {
            !host.run(&filter).is_empty()
        });
    }
    running
}

#[test]
fn every_kind_of_target() {
    let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
    wks.link(
        "eth0",
        &["10.0.0.1/24", "fd00::1/64"],
        &vps,
        "eth0",
        &["10.0.0.2/24", "fd00::2/64"],
    );
    // a reply without a pathway leaves by it
    wks.ip("route add default via 10.0.0.2");
    wks.ip("-6 route add default via fd00::2");
    let container = Host::new("container");
    wks.ip("link add br0 type bridge");
    wks.link(
        "port0",
        &[],
        &container,
        "eth0",
        &["172.18.0.2/24", "fd18::2/64"],
    );
    wks.ip("link set port0 master br0");
    for address in ["172.18.0.1/24", "fd18::1/64"] {
        wks.address("br0", address);
    }
    wks.ip("link set br0 up");
    let routed = Host::new("routed");
    wks.link(
        "lan",
        &["172.19.0.1/24", "fd19::1/64"],
        &routed,
        "eth0",
        &["172.19.0.2/24", "fd19::2/64"],
    );
    for (host, network) in [(&container, 18), (&routed, 19)] {
        host.ip(&format!("route add default via 172.{network}.0.1"));
        host.ip(&format!("-6 route add default via fd{network}::1"));
    }
    let kinds = [
        ("loopback", &wks, "127.0.0.1", "::1"),
        ("own", &wks, "10.0.0.1", "fd00::1"),
        ("container", &container, "172.18.0.2", "fd18::2"),
        ("routed", &routed, "172.19.0.2", "fd19::2"),
    ];
    let instances: String = (5300..)
        .zip(kinds)
        .map(|(port, (name, _, v4, v6))| {
            format!("{name}\t123\t10.0.0.1:{port}\t{v4}\t7000\t{v6}\tprotocol=udp\n")
        })
        .collect();
    wks.write("etc/pathways.conf", "123\n");
    wks.write("etc/instances.tsv", instances);
    wks.write("etc/allow.txt", "10.0.0.2\n");
    done(&wks, "pathway add-all");
    let services = kinds.map(|(_, host, v4, v6)| {
        [
            Service::echo(host, &format!("{v4}:7000")),
            Service::echo(host, &format!("[{v6}]:7000")),
        ]
    });
    let relays = run(&wks, "run --all", &[5300, 5301, 5302, 5303]);
    for ((port, (name, ..)), of_kind) in (5300..).zip(kinds).zip(&services) {
        for (client, service) in CLIENTS.into_iter().zip(of_kind) {
            // of its own: a port is not bound twice, also not towards two targets
            let client = format!("{client}:{port}");
            let words = format!("10.0.0.1:{port} --client {client}");
            let output = probe(&vps, &words, name.as_bytes());
            assert_eq!(
                output.stdout,
                name.as_bytes(),
                "{name} for {client}: {output:?}\n{}",
                relays.log()
            );
            assert_eq!(service.peer_of(name.as_bytes()), addr(&client));
        }
    }
}
