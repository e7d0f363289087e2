//! Small pieces of many connections, which pass through one ring together, and the same without one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Barrier;

use mmproxyctl::relay::workers::IoUring;
use socket2::SockRef;

use super::lab::{Lab, Relay, Service, exchange, reset, settings};

/// With io_uring and without it: a relay before an echo.
fn both_ways(test: impl Fn(&Lab, &Relay, IoUring)) {
    for io_uring in [IoUring::Auto, IoUring::Off] {
        let lab = Lab::new();
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let relay = Relay::start_with(&lab.wks, settings(&[service.addr]), io_uring);
        test(&lab, &relay, io_uring);
    }
}

/// Around the size of a piece of the ring (16 KiB), of the thread's buffer, and of what is bulk.
const SIZES: [usize; 9] = [1, 64, 1000, 16_383, 16_384, 16_385, 32_768, 65_537, 200_000];

/// Bytes that say whose they are and which.
fn bytes(connection: usize, number: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (connection * 31 + number * 7 + at + (at >> 8)) as u8)
        .collect()
}

/// Does something with each of so many relayed connections, all of them at the same time.
fn at_once(lab: &Lab, relay: &Relay, connections: usize, work: impl Fn(usize, TcpStream) + Sync) {
    let streams: Vec<_> = (0..connections)
        .map(|number| lab.connect(relay, &format!("192.0.2.{}:4000", number + 1)))
        .collect();
    let start = Barrier::new(connections);
    std::thread::scope(|scope| {
        for (connection, stream) in streams.into_iter().enumerate() {
            let (start, work) = (&start, &work);
            scope.spawn(move || {
                start.wait();
                work(connection, stream);
            });
        }
    });
}

#[test]
fn nobody_gets_anothers_bytes() {
    const CONNECTIONS: usize = 24;
    both_ways(|lab, relay, io_uring| {
        at_once(lab, relay, CONNECTIONS, |connection, mut stream| {
            for number in 0..90 {
                let length = SIZES[(number * number + connection) % SIZES.len()];
                exchange(&mut stream, &bytes(connection, number, length));
            }
        });
        relay.wait("all over", |totals| totals.active == 0);
        let totals = relay.totals();
        assert_eq!(
            totals.bytes_to_target, totals.bytes_to_client,
            "{io_uring:?}"
        );
        assert_eq!(totals.resets, 0, "{io_uring:?}");
    });
}

/// The service echoes, so nothing moves any more once all buffers between are full.
#[test]
fn a_client_that_does_not_read_gets_everything_later() {
    const CONNECTIONS: usize = 6;
    const PIECES: usize = 24_000;
    both_ways(|lab, relay, _| {
        std::thread::scope(|scope| {
            for connection in 0..CONNECTIONS {
                let mut stream = lab.connect(relay, &format!("192.0.2.{}:4000", connection + 1));
                scope.spawn(move || {
                    let mut sender = stream.try_clone().unwrap();
                    let sending = std::thread::spawn(move || {
                        for number in 0..PIECES {
                            sender.write_all(&bytes(connection, number, 500)).unwrap();
                        }
                    });
                    // so long that every buffer is full
                    std::thread::sleep(std::time::Duration::from_millis(500));
                    let mut answer = [0; 500];
                    for number in 0..PIECES {
                        stream.read_exact(&mut answer).unwrap();
                        assert!(answer == *bytes(connection, number, 500), "piece {number}");
                    }
                    sending.join().unwrap();
                });
            }
        });
        relay.wait("all over", |totals| totals.active == 0);
    });
}

/// Half of the connections are reset while pieces of theirs are under way.
#[test]
fn resets_among_others_bytes() {
    const CONNECTIONS: usize = 40;
    both_ways(|lab, relay, _| {
        for round in 0..5 {
            at_once(lab, relay, CONNECTIONS, |connection, mut stream| {
                if connection % 2 == 0 {
                    stream.write_all(&bytes(connection, round, 3000)).unwrap();
                    reset(stream);
                } else {
                    for number in 0..20 {
                        exchange(&mut stream, &bytes(connection, number, 3000));
                    }
                }
            });
            relay.wait("all over", |totals| totals.active == 0);
        }
    });
}

/// A read ends at an urgent mark however much is behind it, and a splice does not get past it.
#[test]
fn what_is_behind_an_urgent_byte_comes_without_more_behind_it() {
    const CONNECTIONS: usize = 8;
    both_ways(|lab, relay, io_uring| {
        for length in [3, 20_000, 1_000_000] {
            at_once(lab, relay, CONNECTIONS, |connection, mut stream| {
                let (before, behind) = (bytes(connection, 1, length), bytes(connection, 2, 3));
                let mut echo = vec![0; before.len() + 1 + behind.len()];
                std::thread::scope(|scope| {
                    let mut sender = stream.try_clone().unwrap();
                    let (before, behind) = (&before, &behind);
                    scope.spawn(move || {
                        sender.write_all(before).unwrap();
                        assert_eq!(SockRef::from(&sender).send_out_of_band(b"!").unwrap(), 1);
                        sender.write_all(behind).unwrap();
                    });
                    let read = stream.read_exact(&mut echo);
                    read.unwrap_or_else(|error| panic!("{io_uring:?}, {length}: {error}"));
                });
                assert!(echo == [before, b"!".to_vec(), behind].concat());
            });
        }
    });
}
