//! A flow that keeps its worker busy has its answers read by another one, and nobody can tell.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use mmproxyctl::model::UdpHeader::{self, Every, First, Spp};
use mmproxyctl::relay::counters::ConnectFailure;
use mmproxyctl::relay::spp;
use mmproxyctl::relay::udp::Settings;
use mmproxyctl::relay::udp::counters::Ended;
use mmproxyctl::relay::view::{Ask, Connection, Filter, Query};
use tokio::sync::mpsc;

use super::lab::{Proxy, Relay, Service, addr, announce, settings, wait_sockets_to};
use super::workers::listener;
use crate::relay::lab::{Lab, SOON};
use crate::support::net::wait_for;

const CLIENT: &str = "192.0.2.7:4000";
/// How many datagrams are under way.
const UNDER_WAY: usize = 64;
/// How long a flow may take to be lent on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(180);
/// After how long without a datagram a flow ends.
const IDLE: Duration = Duration::from_millis(400);

/// Datagrams of one client, or of some in turn, each answered by itself.
struct Stream {
    proxy: Proxy,
    clients: Vec<String>,
    mode: UdpHeader,
    sent: u64,
    awaited: HashSet<u64>,
}

/// Of another size than the one before: none can be sent together with others, which keeps a worker busy.
fn payload(number: u64) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.resize(40 + (number as usize % 7) * 8, number as u8);
    bytes
}

impl Stream {
    fn new(proxy: Proxy, clients: &[&str], mode: UdpHeader) -> Self {
        Self {
            proxy,
            clients: clients.iter().map(|&client| client.to_owned()).collect(),
            mode,
            sent: 0,
            awaited: HashSet::new(),
        }
    }

    fn header(&self) -> Vec<u8> {
        let client = &self.clients[self.sent as usize % self.clients.len()];
        match self.mode {
            First if self.sent > 0 => Vec::new(),
            Every | First => announce(client),
            Spp => spp::Spp::new(addr(client), addr("198.51.100.1:443"))
                .bytes()
                .to_vec(),
        }
    }

    fn send(&mut self) {
        self.proxy.send(&[&self.header(), &payload(self.sent)]);
        self.awaited.insert(self.sent);
        self.sent += 1;
    }

    /// Takes an answer, which must be one that is awaited, byte for byte.
    fn take(&mut self, answer: &[u8]) {
        let answer = match self.mode {
            Spp => answer.strip_prefix(&*self.header()).expect("the header"),
            Every | First => answer,
        };
        let number = u64::from_be_bytes(answer[..8].try_into().expect("a number"));
        assert!(self.awaited.remove(&number), "{number} was not awaited");
        assert_eq!(answer, payload(number));
    }

    /// Sends on until it holds. Nothing is under way then.
    fn until(&mut self, what: &str, service: &Service, holds: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < end, "{what}");
            self.exchange(256);
            service.forget();
        }
    }

    /// Sends so many.
    fn exchange(&mut self, datagrams: u64) {
        let all = self.sent + datagrams;
        while self.sent < all || !self.awaited.is_empty() {
            while self.sent < all && self.awaited.len() < UNDER_WAY {
                self.send();
            }
            let answer = self.proxy.answer();
            self.take(&answer);
        }
    }

    /// Takes what comes until nothing does for a while; the rest is lost.
    fn take_rest(&mut self) {
        self.proxy.be_patient(Duration::from_millis(200));
        let mut buffer = [0; 2048];
        while let Ok(length) = self.proxy.socket.recv(&mut buffer) {
            self.take(&buffer[..length]);
        }
        self.proxy.be_patient(SOON);
        self.awaited.clear();
    }
}

/// Answers sent by workers that sent nothing to the service.
fn read_elsewhere(relay: &Relay) -> u64 {
    let workers = relay.server.counters().iter().map(|worker| worker.read());
    workers
        .filter(|worker| worker.datagrams_to_target == 0)
        .map(|worker| worker.datagrams_to_client)
        .sum()
}

/// What the relay says about its flows.
fn rows(relay: &Relay, what: Ask) -> Vec<Connection> {
    let (reply, mut answers) = mpsc::unbounded_channel();
    relay.server.ask(&Query {
        what,
        filter: Filter::default(),
        reply,
    });
    let mut rows = Vec::new();
    while let Some(more) = answers.blocking_recv() {
        rows.extend(more);
    }
    rows
}

/// A relay with two workers, and a flow whose answers the one reads that gets nothing from the proxy.
struct Busy {
    service: Service,
    relay: Relay,
    stream: Stream,
}

impl Busy {
    fn new(lab: &Lab, mode: UdpHeader) -> Self {
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let settings = Settings {
            idle_timeout: IDLE,
            ..settings(mode, &[service.addr])
        };
        let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings);
        let proxy = Proxy::new(&lab.vps, relay.addr);
        let mut stream = Stream::new(proxy, &[CLIENT], mode);
        stream.until("never lent", &service, || read_elsewhere(&relay) > 0);
        Self {
            service,
            relay,
            stream,
        }
    }

    /// The flow is gone with its socket, and the client may come again by the same port.
    fn assert_ended(&mut self, lab: &Lab) {
        self.relay
            .wait("the flow's end", |totals| totals.flows == 0);
        wait_sockets_to(&lab.wks, self.service.addr, 0);
        self.service.forget();
        self.stream.send();
        let answer = self.stream.proxy.answer();
        self.stream.take(&answer);
        assert_eq!(self.service.next().peer, addr(CLIENT));
        assert_eq!(self.relay.totals().ports_given_up, 0);
    }
}

#[test]
fn byte_for_byte_in_every_mode() {
    for mode in [Every, First, Spp] {
        let lab = Lab::new();
        let Busy {
            service,
            relay,
            mut stream,
        } = Busy::new(&lab, mode);
        // it comes back now and then, to see whether the other worker is idle but for it
        stream.until("never lent again", &service, || {
            relay.totals().flows_lent > 1
        });
        // each is counted once it is sent
        relay.wait("all to be counted", |totals| {
            totals.datagrams_to_target == stream.sent && totals.datagrams_to_client == stream.sent
        });
        let totals = relay.totals();
        assert_eq!(totals.flows_opened, 1);
        assert_eq!(totals.dropped.all() + totals.ports_given_up, 0);
    }
}

#[test]
fn silence_in_both_directions_ends_it() {
    let lab = Lab::new();
    let mut busy = Busy::new(&lab, Every);
    let (service, proxy) = (&busy.service, &busy.stream.proxy);
    // its own worker hears nothing of this
    let end = Instant::now() + 3 * IDLE;
    while Instant::now() < end {
        service.say(addr(CLIENT), b"unasked");
        assert_eq!(proxy.answer(), b"unasked");
        std::thread::sleep(IDLE / 10);
    }
    assert_eq!(busy.relay.totals().flows, 1);
    busy.assert_ended(&lab);
    let totals = busy.relay.totals();
    assert_eq!(totals.ended.of(Ended::Idle), 1);
    assert_eq!(totals.flows_unanswered, 0);
}

/// Another flow of its worker's, used after it, ends after it.
#[test]
fn it_ends_by_its_own_last_answer() {
    const OTHER: &str = "192.0.2.8:4000";
    let lab = Lab::new();
    let busy = Busy::new(&lab, Every);
    let (service, proxy) = (&busy.service, &busy.stream.proxy);
    // its own worker hears nothing of this
    std::thread::sleep(IDLE / 8);
    service.say(addr(CLIENT), b"unasked");
    assert_eq!(proxy.answer(), b"unasked");
    std::thread::sleep(IDLE / 2);
    proxy.exchange(OTHER, b"hello");
    busy.relay.wait("both ends", |totals| totals.flows == 0);
    let rows = rows(&busy.relay, Ask::Recent);
    let clients: Vec<_> = rows.iter().map(|row| row.client).collect();
    assert_eq!(clients, [CLIENT, OTHER].map(|one| Some(addr(one))));
}

#[test]
fn a_command_ends_it() {
    let lab = Lab::new();
    let mut busy = Busy::new(&lab, Every);
    let rows = rows(&busy.relay, Ask::Kill);
    let bytes: u64 = (0..busy.stream.sent)
        .map(|one| payload(one).len() as u64)
        .sum();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(
        (rows[0].bytes_to_target, rows[0].bytes_to_client),
        (bytes, bytes)
    );
    busy.assert_ended(&lab);
}

#[test]
fn a_service_that_goes_down_ends_it() {
    for mode in [Every, First] {
        let lab = Lab::new();
        let mut busy = Busy::new(&lab, mode);
        let at = busy.service.addr.to_string();
        busy.service = Service::echo(&lab.wks, "127.0.0.1:0");
        wait_for("ICMP", || {
            // some at a time, so that now its own worker is told, now the reader
            for _ in 0..8 {
                busy.stream.send();
            }
            let failed = busy.relay.totals().open_failed;
            failed.of(ConnectFailure::ServiceDown) > 0
        });
        busy.service = Service::echo(&lab.wks, &at);
        // the last one may still have found the new one
        busy.stream.take_rest();
        match mode {
            First => busy.stream.exchange(1),
            _ => busy.assert_ended(&lab),
        }
        assert_eq!(busy.relay.totals().ports_given_up, 0);
    }
}

/// One datagram, so that nobody but the reader can be told.
#[test]
fn what_icmp_tells_the_reader_ends_it() {
    let lab = Lab::new();
    let (tell, told) = std::sync::mpsc::channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |socket, seen| {
        if seen.bytes == b"go" {
            // nothing listens for anybody else from here on
            socket.connect("127.0.0.1:9").expect("connect");
            tell.send(()).expect("somebody waits");
        } else {
            let _ = socket.send_to(&seen.bytes, seen.peer);
        }
    });
    let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let mut stream = Stream::new(proxy, &[CLIENT], Every);
    stream.until("never lent", &service, || read_elsewhere(&relay) > 0);
    stream.proxy.send(&[&announce(CLIENT), b"go"]);
    told.recv_timeout(SOON).expect("the service's end");
    stream.proxy.send(&[&announce(CLIENT), b"hello"]);
    relay.wait("the flow's end", |totals| {
        totals.ended.of(Ended::ServiceDown) == 1
    });
}

#[test]
fn a_drain_ends_it() {
    let lab = Lab::new();
    let busy = Busy::new(&lab, Every);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let start = Instant::now();
    busy.relay.server.drain();
    runtime
        .block_on(busy.relay.server.ended())
        .expect("no error");
    assert!(start.elapsed() < Duration::from_millis(500));
    wait_sockets_to(&lab.wks, busy.service.addr, 0);
}

/// The kernel deals a flow that is lent out to the very worker that reads its answers, and back.
#[test]
fn it_comes_to_the_worker_that_reads_it() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let at = "10.0.0.1:7000";
    let listeners = vec![listener(&lab.wks, at), listener(&lab.wks, at)];
    let relay = Relay::start_on(&lab.wks, listeners, settings(Every, &[service.addr]));
    // one in six moves to the other worker; half of them, to where nobody reads
    for number in 0u16.. {
        assert!(number < 100, "no flow moves");
        let client = format!("192.0.2.7:{}", 4000 + number);
        let mut stream = Stream::new(Proxy::new(&lab.vps, relay.addr), &[&client], Every);
        let lent = relay.totals().flows_lent;
        stream.until("never lent", &service, || relay.totals().flows_lent > lent);
        let third = listener(&lab.wks, at);
        let listeners = || lab.wks.run("ss -Huan sport = :7000").lines().count();
        for _ in 0..UNDER_WAY {
            stream.send();
        }
        stream.take_rest();
        if relay.totals().flows_adopted > 0 {
            stream.exchange(2_000);
            assert_eq!(relay.totals().flows_adopted, 1);
            drop(third);
            wait_for("its end", || listeners() == 2);
            stream.exchange(2_000);
            assert_eq!(relay.totals().flows_adopted, 2);
            assert_eq!(relay.totals().ports_given_up, 0);
            return;
        }
        drop(third);
        // it stays while another test starts a program: see `wait_sockets_to`
        wait_for("its end", || listeners() == 2);
    }
}

/// Two flows share a worker: each would have the other wait.
#[test]
fn flows_in_company_are_not_lent() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let mut stream = Stream::new(proxy, &[CLIENT], Every);
    let lent = || relay.totals().flows_lent;
    stream.until("never lent", &service, || lent() > 0);
    stream.clients.push("192.0.2.8:4000".to_owned());
    stream.exchange(256);
    let before = lent();
    // a loan lasts a second at most
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        stream.exchange(256);
        service.forget();
    }
    assert_eq!(relay.totals().flows, 2);
    assert_eq!(lent(), before);
}

/// A stream of answers: most of what there is to do is the reader's.
#[test]
fn it_is_lent_once_a_second_at_most() {
    const ANSWERS: usize = 32;
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        for number in 0..ANSWERS {
            // of another size than the one before: see `payload`
            let _ = socket.send_to(&vec![0; 40 + number % 7], seen.peer);
        }
    });
    let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(First, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let start = Instant::now();
    proxy.send(&[&announce(CLIENT), b"more"]);
    for sent in 1.. {
        std::thread::sleep(Duration::from_micros(500));
        proxy.send(&[b"more"]);
        let lent = relay.totals().flows_lent;
        assert!(lent <= 1 + start.elapsed().as_secs(), "{lent}");
        if lent > 1 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "lent {lent} times, {sent} sent");
        service.forget();
    }
}

/// Answers that were read before others are sent before them, whoever reads.
#[test]
fn answers_keep_their_order() {
    const ANSWERS: u64 = 8;
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        for number in 0..ANSWERS {
            let mut answer = seen.bytes.clone();
            answer.push(number as u8);
            // of another size than the one before: see `payload`
            answer.resize(40 + number as usize, 0);
            let _ = socket.send_to(&answer, seen.peer);
        }
    });
    let relay = Relay::start_at(&lab.wks, "10.0.0.1:0", 2, settings(First, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.be_patient(Duration::from_millis(200));
    let end = Instant::now() + PATIENCE;
    let (mut sent, mut last, mut under_way) = (0u64, None, 0);
    let mut buffer = [0; 64];
    while relay.totals().flows_lent < 3 {
        assert!(Instant::now() < end, "never lent");
        while under_way < UNDER_WAY * ANSWERS as usize {
            match sent {
                0 => proxy.send(&[&announce(CLIENT), &sent.to_be_bytes()]),
                _ => proxy.send(&[&sent.to_be_bytes()]),
            }
            sent += 1;
            under_way += ANSWERS as usize;
        }
        if proxy.socket.recv(&mut buffer).is_err() {
            // some are lost where a buffer is full
            under_way = 0;
            continue;
        }
        under_way = under_way.saturating_sub(1);
        let answer = Some(buffer[..9].to_vec());
        assert!(last < answer, "{last:?} before {answer:?}");
        last = answer;
        service.forget();
    }
}
