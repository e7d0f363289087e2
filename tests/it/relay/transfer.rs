//! Bytes both ways: nothing lost or changed, ends and resets passed on.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use mmproxyctl::relay::settings::Settings;

use super::lab::{Lab, Relay, SOON, Service, exchange, reset, settings};
use crate::support::net::wait_for;

const GIGABYTE: u64 = 1_000_000_000;
const BLOCK: usize = 1 << 20;

/// A block of bytes that repeats with no period a buffer could have.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..BLOCK / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// Sends so many bytes, in pieces of ever other sizes; returns their checksum.
fn send(stream: &mut TcpStream, total: u64, sizes: &[usize]) -> u32 {
    let noise = noise();
    let (mut sent, mut checksum, mut round) = (0, 0, 0);
    while sent < total {
        let size = sizes[round % sizes.len()].min(usize::try_from(total - sent).expect("fits"));
        let at = (round * 7919) % (BLOCK - size + 1);
        let piece = &noise[at..at + size];
        stream.write_all(piece).expect("send");
        checksum = crc32c::crc32c_append(checksum, piece);
        sent += size as u64;
        round += 1;
    }
    checksum
}

/// Receives until the end; returns how many bytes and their checksum.
fn receive(stream: &mut TcpStream) -> (u64, u32) {
    let mut buffer = vec![0; BLOCK];
    let (mut received, mut checksum) = (0, 0);
    loop {
        match stream.read(&mut buffer).expect("receive") {
            0 => return (received, checksum),
            length => {
                checksum = crc32c::crc32c_append(checksum, &buffer[..length]);
                received += length as u64;
            }
        }
    }
}

/// Sends and receives at the same time, closing its half when done.
fn both_ways(stream: TcpStream, total: u64) -> (u32, (u64, u32)) {
    let mut sender = stream.try_clone().expect("clone");
    let sending = std::thread::spawn(move || {
        let checksum = send(&mut sender, total, &[BLOCK, 65_536, 100_000, 1448, 1]);
        sender.shutdown(Shutdown::Write).expect("shutdown");
        checksum
    });
    let mut stream = stream;
    let received = receive(&mut stream);
    (sending.join().expect("sender"), received)
}

#[test]
fn a_gigabyte_each_way_at_once() {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |stream| {
        report.send(both_ways(stream, GIGABYTE)).unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let stream = lab.connect(&relay, "192.0.2.7:4000");
    let (sent, received) = both_ways(stream, GIGABYTE);
    let (service_sent, service_received) = reports.recv_timeout(SOON).unwrap();
    assert_eq!(service_received, (GIGABYTE, sent));
    assert_eq!(received, (GIGABYTE, service_sent));
    relay.wait("closed", |totals| totals.active == 0);
    let totals = relay.totals();
    assert_eq!(totals.bytes_to_target, GIGABYTE);
    assert_eq!(totals.bytes_to_client, GIGABYTE);
    assert_eq!(totals.resets, 0);
    assert!(totals.bytes_spliced > GIGABYTE, "{totals:#?}");
}

/// `splice(socket → pipe)` says EAGAIN when the *pipe* has no slot left, too. A relay that takes that
/// for an empty socket waits for a readiness event that never comes: everything has arrived already.
///
/// So: the service does not read until the relay is stuck with a full pipe and everything else, more
/// tiny segments than a pipe has slots, lies in the relay's receive buffer, and nothing is sent after.
#[test]
fn a_pipe_without_a_free_slot_does_not_stall() {
    const BULK: usize = 600_000;
    const TINY: usize = 2_000;
    const TINY_LEN: usize = 50;
    const TOTAL: usize = BULK + TINY * TINY_LEN;
    let lab = Lab::new();
    // small send buffers, so that the relay gets stuck early; receive buffers that are never tidied up
    lab.wks.sysctl("net.ipv4.tcp_wmem", "4096 16384 65536");
    lab.wks.sysctl("net.ipv4.tcp_rmem", "4096 6291456 6291456");
    let (go, gone) = channel::<()>();
    let gone = std::sync::Mutex::new(gone);
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        gone.lock().unwrap().recv_timeout(SOON).unwrap();
        let mut data = vec![0; TOTAL];
        stream.read_exact(&mut data).unwrap();
        stream
            .write_all(&crc32c::crc32c(&data).to_be_bytes())
            .unwrap();
    });
    service.receive_buffer(65_536);
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    let arrived = || {
        wait_for("all of it in the relay's receive buffer", || {
            let sockets = lab.vps.run("ss -Htn state established");
            sockets.split_whitespace().nth(1) == Some("0")
        });
    };
    let noise = noise();
    stream.write_all(&noise[..BULK]).unwrap();
    arrived();
    relay.wait("bulk mode", |totals| totals.bytes_spliced > 0);
    for tiny in noise[BULK..TOTAL].chunks(TINY_LEN) {
        stream.write_all(tiny).unwrap();
    }
    arrived();
    let passed = relay.totals().bytes_to_target;
    assert!(passed < BULK as u64, "the relay is not stuck: {passed}");
    go.send(()).unwrap();
    let mut checksum = [0; 4];
    stream.read_exact(&mut checksum).unwrap();
    assert_eq!(
        u32::from_be_bytes(checksum),
        crc32c::crc32c(&noise[..TOTAL])
    );
}

/// From bulk to small exchanges and back, on one connection.
#[test]
fn bulk_and_small_exchanges_in_turn() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    let noise = noise();
    let mut spliced = 0;
    for round in 0..3 {
        for at in 0..50 {
            exchange(&mut stream, &noise[at..at + 64]);
        }
        let mut sender = stream.try_clone().unwrap();
        let bulk = noise.clone();
        let sending = std::thread::spawn(move || sender.write_all(&bulk).unwrap());
        let mut answer = vec![0; noise.len()];
        stream.read_exact(&mut answer).unwrap();
        sending.join().unwrap();
        assert!(answer == noise, "round {round}");
        let now = relay.totals().bytes_spliced;
        assert!(now > spliced, "round {round} was not spliced");
        spliced = now;
    }
}

/// The client has said everything and still hears the answer.
#[test]
fn the_client_closes_its_half_first() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |mut stream| {
        let mut request = String::new();
        stream.read_to_string(&mut request).unwrap();
        write!(stream, "you said {request}").unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "you said hello");
    relay.wait("closed", |totals| totals.active == 0 && totals.resets == 0);
}

/// The service has said everything and still hears the client.
#[test]
fn the_service_closes_its_half_first() {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        stream.write_all(b"speak").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        report.send(said).unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    let mut prompt = String::new();
    stream.read_to_string(&mut prompt).unwrap();
    assert_eq!(prompt, "speak");
    stream.write_all(b"I am still here").unwrap();
    drop(stream);
    assert_eq!(reports.recv_timeout(SOON).unwrap(), "I am still here");
    relay.wait("closed", |totals| totals.active == 0 && totals.resets == 0);
}

/// A client that has said everything, and a service too, are gone for the other before they heard its end.
#[test]
fn a_side_that_resets_after_its_end_is_noticed() {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        // works on the answer until it hears that nobody wants it
        while stream.take_error().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        report.send(said).unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    reset(stream);
    assert_eq!(reports.recv_timeout(SOON).unwrap(), "hello");
    relay.wait("the reset", |totals| {
        totals.active == 0 && totals.resets == 1
    });
    let silent = Service::start(&lab.wks, "127.0.0.1:0", |stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        reset(stream);
    });
    let relay = Relay::start(&lab.wks, settings(&[silent.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4001");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "the end");
    relay.wait("the reset", |totals| {
        totals.active == 0 && totals.resets == 1
    });
}

/// A service that says goodbye and goes: the client gets every byte and the end.
#[test]
fn the_service_closes_first() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |mut stream| {
        let mut request = [0; 5];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(b"goodbye").unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    stream.write_all(b"hello").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "goodbye");
    drop(stream);
    relay.wait("closed", |totals| totals.active == 0);
}

fn report_error(report: &Sender<ErrorKind>, stream: &mut TcpStream) {
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                report.send(error.kind()).expect("the test listens");
                break;
            }
        }
    }
}

/// A client that resets, on an idle connection: the service must not take it for a good end.
#[test]
fn a_reset_by_the_client_reaches_the_service() {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        stream.write_all(b"ready").unwrap();
        report_error(&report, &mut stream);
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    let mut ready = [0; 5];
    stream.read_exact(&mut ready).unwrap();
    reset(stream);
    assert_eq!(
        reports.recv_timeout(SOON).unwrap(),
        ErrorKind::ConnectionReset
    );
    relay.wait("closed", |totals| totals.active == 0 && totals.resets == 1);
}

/// A service that resets: the client must not take it for a good end.
#[test]
fn a_reset_by_the_service_reaches_the_client() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |mut stream| {
        let mut request = [0; 5];
        stream.read_exact(&mut request).unwrap();
        reset(stream);
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    stream.write_all(b"hello").unwrap();
    let error = stream.read(&mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    relay.wait("closed", |totals| totals.active == 0 && totals.resets == 1);
}

/// A reset in the middle of a bulk transfer that nobody reads.
#[test]
fn a_reset_during_a_blocked_transfer() {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        stream.set_nonblocking(true).unwrap();
        let noise = noise();
        let error = loop {
            match stream.write(&noise) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => break error,
            }
        };
        report.send(error.kind()).unwrap();
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let stream = lab.connect(&relay, "192.0.2.7:4000");
    relay.wait("bulk", |totals| totals.bytes_to_client > 100_000);
    reset(stream);
    let kind = reports.recv_timeout(SOON).unwrap();
    assert!(
        matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{kind}"
    );
    relay.wait("closed", |totals| totals.active == 0);
}

/// Ends when nothing moved for the time, and not while something does.
#[test]
fn the_idle_timeout_is_exact() {
    const LIMIT: Duration = Duration::from_millis(300);
    const SLACK: Duration = Duration::from_secs(1);
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(
        &lab.wks,
        Settings {
            idle_timeout: Some(LIMIT),
            ..settings(&[service.addr])
        },
    );
    let mut stream = lab.connect(&relay, "192.0.2.7:4000");
    let start = Instant::now();
    while start.elapsed() < LIMIT * 2 {
        exchange(&mut stream, b"busy");
        std::thread::sleep(LIMIT / 5);
    }
    let before = Instant::now();
    exchange(&mut stream, b"last");
    let after = Instant::now();
    assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0);
    // not a moment early; late by no more than a busy machine makes it
    assert!(before.elapsed() >= LIMIT, "{:?}", before.elapsed());
    assert!(after.elapsed() < LIMIT + SLACK, "{:?}", after.elapsed());
    assert_eq!(relay.totals().idle_ended, 1);
}
