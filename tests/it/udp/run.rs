//! `mmproxyctl run` with UDP instances, as a process: reload, handing over, floods.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::cells::{done, probe, run};
use super::lab::{Proxy, Service, addr, announce, wait_sockets_to};
use crate::relay::lab::SOON;
use crate::support::net::{Host, Running, wait_for};

const LISTEN: &str = "10.0.0.1:5300";
pub(super) const PORT: u16 = 5300;

/// A configured host with an echo service, and a host to be the proxy.
pub(super) struct Rig {
    pub(super) wks: Host,
    pub(super) vps: Host,
    pub(super) service: Service,
}

impl Rig {
    /// With these options of the instance, beside `protocol=udp`.
    pub(super) fn new(options: &str) -> Self {
        let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
        wks.link("eth0", &["10.0.0.1/24"], &vps, "eth0", &["10.0.0.2/24"]);
        let service = Service::echo(&wks, "127.0.0.1:0");
        let rig = Self { wks, vps, service };
        rig.wks
            .write("etc/pathways.conf", "123 connmark=auto # vps01\n");
        rig.wks.write("etc/allow.txt", "10.0.0.2 # vps01\n");
        rig.instance(&rig.service, options);
        done(&rig.wks, "pathway add 123");
        rig
    }

    /// Writes instances.tsv.
    pub(super) fn instance(&self, service: &Service, options: &str) {
        self.wks
            .write("etc/instances.tsv", line("echo", LISTEN, service, options));
    }

    pub(super) fn start(&self) -> Running {
        run(&self.wks, "run echo", &[PORT])
    }

    /// The same with so many descriptors at most.
    fn start_with_descriptors(&self, limit: usize) -> Running {
        let mmproxyctl = self.wks.mmproxyctl("run echo");
        let mut command = self.wks.command("prlimit");
        command
            .arg(format!("--nofile={limit}:{limit}"))
            .arg(mmproxyctl.get_program())
            .args(mmproxyctl.get_args());
        for (name, value) in mmproxyctl.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let relay = self.wks.spawn(command);
        relay.wait_log("relaying");
        relay
    }

    pub(super) fn proxy(&self) -> Proxy {
        Proxy::new(&self.vps, addr(LISTEN))
    }
}

/// A line of instances.tsv.
pub(super) fn line(name: &str, listen: &str, service: &Service, options: &str) -> String {
    let port = service.addr.port();
    format!("{name}\t123\t{listen}\t127.0.0.1\t{port}\t-\tprotocol=udp{options}\n")
}

#[test]
fn probe_is_a_proxy_of_each_kind() {
    for (options, words) in [
        ("", ""),
        (",udp-header=first", "--first"),
        (",udp-header=spp", "--version spp"),
    ] {
        let rig = Rig::new(options);
        let _relay = rig.start();
        let client = "203.0.113.7:4000";
        let words = format!("{LISTEN} --client {client} {words}");
        let one = probe(&rig.vps, &words, b"one\ndatagram\n");
        assert!(one.status.success(), "{one:?}");
        assert_eq!(one.stdout, b"one\ndatagram\n");
        assert_eq!(rig.service.peer_of(b"one\ndatagram\n"), addr(client));
        let lines = probe(&rig.vps, &format!("{words} --lines"), b"one\ntwo\nthree");
        assert!(lines.status.success(), "{lines:?}");
        assert_eq!(lines.stdout, b"one\ntwo\nthree\n");
        for line in ["one", "two", "three"] {
            let peer = rig.service.peer_of(line.as_bytes());
            assert_eq!(peer.ip(), addr(client).ip());
        }
        let refused = probe(
            &rig.vps,
            &format!("{words} --corrupt bad-signature --timeout 300ms"),
            b"x",
        );
        // with `first` a header with another signature is payload, of a flow that nobody opened
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        rig.service.assert_nothing_more();
    }
    let nobody = Host::new("nobody");
    let output = probe(&nobody, "127.0.0.1:9 --client 192.0.2.7:1", b"x");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("nothing listens there"), "{said}");
}

/// A service bound to the wildcard address may answer from elsewhere, past the relay: said at the start.
#[test]
fn a_wildcard_service_is_named_in_the_log() {
    let rig = Rig::new("");
    let service = Service::echo(&rig.wks, "0.0.0.0:0");
    rig.instance(&service, "");
    let relay = rig.start();
    relay.wait_log("the service is bound to the wildcard address");
}

/// Where descriptors are short, whoever floods pays, and the process can be asked what is going on.
#[test]
fn a_flood_without_descriptors_leaves_the_others_alone() {
    let rig = Rig::new(",udp-header=first");
    rig.wks.write("etc/allow.txt", "10.0.0.0/24\n");
    rig.vps.address("eth0", "10.0.0.3/24");
    let limit = 96;
    let relay = rig.start_with_descriptors(limit);
    let through = |proxy: &str| Proxy::from(&rig.vps, addr(proxy), addr(LISTEN));
    let quiet: Vec<_> = (0..5)
        .map(|number| {
            let proxy = through("10.0.0.3:0");
            let client = format!("198.51.100.{number}:4000");
            proxy.exchange(&client, b"hello");
            rig.service.next();
            (proxy, client)
        })
        .collect();
    let flood: Vec<_> = (0..200)
        .map(|number| {
            let proxy = through("10.0.0.2:0");
            proxy.exchange(&format!("203.0.113.{number}:4000"), b"flood");
            rig.service.next();
            proxy
        })
        .collect();
    done(&rig.wks, "status echo");
    assert!(descriptors(&relay) < limit - 8, "{}", descriptors(&relay));
    for (proxy, client) in &quiet {
        proxy.send(&[b"still here"]);
        assert_eq!(proxy.answer(), b"still here");
        assert_eq!(rig.service.peer_of(b"still here"), addr(client));
    }
    drop(flood);
}

/// Another process takes over while a sender asks on, one question after the other: none is lost.
#[test]
fn an_upgrade_loses_no_datagram() {
    let rig = Rig::new("");
    let mut relay = rig.start();
    let proxy = rig.proxy();
    let asked = |number: u32| {
        let client = format!("203.0.113.{}:4000", number % 50);
        proxy.exchange(&client, &number.to_be_bytes());
    };
    (0..500).for_each(asked);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| done(&rig.wks, "upgrade echo"));
        let mut number = 500;
        while !upgrade.is_finished() || number < 2_000 {
            asked(number);
            number += 1;
        }
    });
    assert!(relay.wait(SOON).success());
    (0..500).for_each(asked);
    let said = relay.log();
    assert!(said.contains("handed over"), "{said}");
    // the successor is nobody's child here
    let pids = rig.wks.run("ss -Hlunp sport = :5300");
    let pid = pids
        .split("pid=")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|pid| pid.parse().ok())
        .expect("the successor");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("SIGTERM");
    wait_for("the successor's end", || {
        rig.wks.run("ss -Hlun sport = :5300").is_empty()
    });
}

/// What the kernel drops because the relay does not read is counted.
#[test]
fn datagrams_lost_for_want_of_buffer_are_counted() {
    let rig = Rig::new("");
    let mut relay = rig.start();
    let proxy = rig.proxy();
    proxy.exchange("203.0.113.7:4000", b"hello");
    relay.signal(Signal::SIGSTOP);
    // each thread stops when it is next scheduled
    wait_for("every thread to stop", || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", relay.pid())).expect("threads");
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.contains(") T ")
        })
    });
    let header = announce("203.0.113.7:4000");
    // 4 MB of buffer, each datagram with its 1 kB of payload counts for more than 2 kB
    for _ in 0..4_000 {
        proxy.send(&[&header, &[0; 1_000]]);
    }
    relay.signal(Signal::SIGCONT);
    let answered = {
        proxy
            .socket
            .set_read_timeout(Some(Duration::from_millis(300)))
            .expect("read timeout");
        let mut buffer = [0; 2_000];
        std::iter::from_fn(|| proxy.socket.recv(&mut buffer).ok()).count()
    };
    assert!((1..4_000).contains(&answered), "{answered} answers");
    proxy.exchange("203.0.113.7:4000", b"still there?");
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(SOON).success());
    let said = relay.log();
    let lost: u32 = said
        .split("overflow.in=")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|count| count.parse().ok())
        .unwrap_or_else(|| panic!("no count: {said}"));
    assert!(lost > 0, "{said}");
}

pub(super) fn descriptors(relay: &Running) -> usize {
    fs::read_dir(format!("/proc/{}/fd", relay.pid()))
        .expect("its descriptors")
        .count()
}

/// Resident memory in kB.
fn resident(relay: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", relay.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).expect("VmRSS")
}

/// 50,000 clients, more than descriptors where these are short: each is served, and all of it goes again.
#[test]
fn fifty_thousand_flows_opened_and_expired() {
    const FLOWS: u32 = 50_000;
    // one at a time in flight would take long, all at once would not fit the buffers
    const WINDOW: u32 = 100;
    let rig = Rig::new(",idle-timeout=2s,max-flows=60000,max-flows-per-proxy=60000");
    let mut relay = rig.start();
    let proxy = rig.proxy();
    let client = |number: u32| {
        let [_, high, middle, low] = number.to_be_bytes();
        format!("198.18.{}.{low}:{}", middle, 4000 + u16::from(high))
    };
    // past the first flows, which make buffers that stay
    for number in 0..WINDOW {
        proxy.exchange(&client(FLOWS + number), b"first");
        rig.service.next();
    }
    wait_sockets_to(&rig.wks, rig.service.addr, 0);
    let before = (descriptors(&relay), resident(&relay));
    let mut most = 0;
    for start in (0..FLOWS).step_by(WINDOW as usize) {
        for number in start..start + WINDOW {
            proxy.send(&[&announce(&client(number)), &number.to_be_bytes()]);
        }
        for _ in 0..WINDOW {
            let answer = proxy.answer();
            assert_eq!(answer.len(), 4);
            let seen = rig.service.next();
            let number = u32::from_be_bytes(seen.bytes.try_into().expect("four bytes"));
            assert_eq!(seen.peer, addr(&client(number)));
        }
        if start % 1000 == 0 {
            most = most.max(descriptors(&relay));
        }
    }
    assert!(most > before.0 + 5_000, "{most} descriptors");
    wait_sockets_to(&rig.wks, rig.service.addr, 0);
    assert_eq!(descriptors(&relay), before.0);
    // the allocator gives pages back a moment later, when it is asked for others
    let limit = before.1 + 12 * 1024;
    let mut more = FLOWS + WINDOW;
    wait_for(&format!("no more than {limit} kB"), || {
        for _ in 0..20 {
            proxy.exchange(&client(more), b"more");
            more += 1;
        }
        resident(&relay) < limit
    });
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(SOON).success());
    let said = relay.log();
    assert!(said.contains(&format!("flows={more} ")), "{said}");
    assert!(said.contains("dropped=0"), "{said}");
}
