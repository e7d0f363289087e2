//! Hundreds of connections at once, each by a script of its own drawn from a seed: pieces of any size in
//! both directions, pauses, slow readers, half-closes and resets at any moment. Every byte is checked, and
//! so is how it ends; whoever waits too long has been forgotten by the relay.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use mmproxyctl::relay::workers::IoUring;

use super::lab::{Lab, Relay, SOON, Service, reset, settings};

const CONNECTIONS: u64 = 250;
const ROUNDS: u64 = if cfg!(feature = "soak") { 40 } else { 2 };

/// What both sides say first and hear, so that nobody resets what has not been relayed yet.
const GREETING: &[u8] = b"hello";

/// xorshift64*, from a seed that has been stirred.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        let mut dice = Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        dice.next();
        dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    /// One time in so many.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pause(&mut self) {
        match self.below(20) {
            0..12 => {}
            12..19 => std::thread::sleep(Duration::from_micros(self.below(3000))),
            _ => std::thread::sleep(Duration::from_millis(self.below(40))),
        }
    }

    /// Small most of the time, and around the sizes where the relay changes its ways.
    fn size(&mut self) -> usize {
        let size = match self.below(16) {
            0..8 => 1 + self.below(300),
            8..11 => 1 + self.below(5000),
            11 => 16_380 + self.below(8),
            12 => 32_764 + self.below(8),
            13 => 65_532 + self.below(8),
            14 => 1 + self.below(70_000),
            _ => 1 + self.below(200_000),
        };
        usize::try_from(size).expect("fits")
    }
}

/// How a direction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The half is closed.
    Close,
    /// The connection is reset, the other direction with it.
    Reset,
}

/// What one side sends.
struct Script {
    seed: u64,
    pieces: Vec<usize>,
    ending: Ending,
}

impl Script {
    /// Of the client (0) or the service (1) of this connection; at most one of them resets.
    fn of(connection: u64, side: u64) -> Self {
        let mut dice = Dice::new(connection);
        let resetting = match dice.below(10) {
            0 => Some(0),
            1 => Some(1),
            _ => None,
        };
        let mut dice = Dice::new(connection * 2 + side + (1 << 40));
        // some directions are silent
        let count = if dice.once_in(8) { 0 } else { dice.below(25) };
        let pieces = (0..count).map(|_| dice.size()).collect();
        let ending = match resetting {
            Some(resetting) if resetting == side => Ending::Reset,
            _ => Ending::Close,
        };
        Self {
            seed: dice.next(),
            pieces,
            ending,
        }
    }

    fn total(&self) -> usize {
        self.pieces.iter().sum()
    }

    /// What its stream holds from there on: differs from place to place and from script to script.
    fn fill(&self, at: usize, buffer: &mut [u8]) {
        for (offset, byte) in buffer.iter_mut().enumerate() {
            let at = (at + offset) as u64;
            let word = (self.seed ^ (at / 8)).wrapping_mul(0x2545_f491_4f6c_dd1d);
            *byte = (word >> (8 * (at % 8))) as u8;
        }
    }
}

fn greet(stream: &mut TcpStream) {
    let mut heard = [0; GREETING.len()];
    stream.write_all(GREETING).expect("greet");
    stream.read_exact(&mut heard).expect("a greeting");
}

/// How many bytes came, and how it ended.
type Received = (usize, io::Result<()>);

fn send(script: &Script, mut stream: &TcpStream) -> io::Result<()> {
    let mut dice = Dice::new(script.seed);
    let (mut at, mut data) = (0, Vec::new());
    for size in &script.pieces {
        data.resize(*size, 0);
        script.fill(at, &mut data);
        stream.write_all(&data)?;
        at += size;
        dice.pause();
    }
    stream.shutdown(match script.ending {
        Ending::Close => Shutdown::Write,
        // for the receiver beside us; the reset comes when both are done
        Ending::Reset => Shutdown::Read,
    })
}

/// Receives what this script says until the end, whichever.
fn receive(script: &Script, mut stream: &TcpStream) -> Received {
    let mut dice = Dice::new(!script.seed);
    let slow = dice.once_in(4);
    if slow {
        std::thread::sleep(Duration::from_millis(dice.below(600)));
    }
    let (mut buffer, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut bytes = 0;
    loop {
        let room = 1 + dice.below(buffer.len() as u64) as usize;
        match stream.read(&mut buffer[..room]) {
            Ok(0) => return (bytes, Ok(())),
            Ok(length) => {
                script.fill(bytes, &mut expected[..length]);
                assert!(
                    expected[..length] == buffer[..length],
                    "other bytes behind {bytes} of {}",
                    script.total()
                );
                bytes += length;
            }
            Err(error) => return (bytes, Err(error)),
        }
        if slow {
            dice.pause();
        }
    }
}

/// One end of a connection, to its end; says what is wrong.
fn play(connection: u64, side: u64, stream: TcpStream) -> Result<(), String> {
    let (own, other) = (
        Script::of(connection, side),
        Script::of(connection, 1 - side),
    );
    let (sent, (bytes, end)) = std::thread::scope(|scope| {
        let sending = scope.spawn(|| send(&own, &stream));
        let received = receive(&other, &stream);
        (sending.join().expect("the sender"), received)
    });
    if own.ending == Ending::Reset {
        reset(stream);
    }
    let forgotten = |outcome: &io::Result<()>| matches!(outcome, Err(error) if error.kind() == ErrorKind::WouldBlock);
    let right = match (own.ending, other.ending) {
        _ if forgotten(&sent) || forgotten(&end) => false,
        (Ending::Reset, _) => true,
        // whichever of the two looks first is told
        (_, Ending::Reset) => bytes <= other.total() && (end.is_err() || sent.is_err()),
        _ => bytes == other.total() && end.is_ok() && sent.is_ok(),
    };
    if right {
        return Ok(());
    }
    Err(format!(
        "connection {connection}, side {side}: {bytes} of {} bytes came, {end:?}; sent {} bytes: {sent:?}; \
         own ending {:?}, the other's {:?}",
        other.total(),
        own.total(),
        own.ending,
        other.ending
    ))
}

/// Which connection this is, from the address that the service was shown.
fn client(number: u64) -> SocketAddr {
    (
        [192, 0, 2, 1 + (number % 250) as u8],
        4000 + (number / 250) as u16,
    )
        .into()
}

fn number_of(client: SocketAddr) -> u64 {
    let IpAddr::V4(ip) = client.ip() else {
        panic!("{client} is nobody's address");
    };
    u64::from(client.port() - 4000) * 250 + u64::from(ip.octets()[3] - 1)
}

fn stress(io_uring: IoUring) {
    let lab = Lab::new();
    let (report, reports) = channel();
    let service = Service::start(&lab.wks, "127.0.0.1:0", move |mut stream| {
        let number = number_of(stream.peer_addr().expect("a peer"));
        greet(&mut stream);
        let _ = report.send(play(number, 1, stream));
    });
    let relay = Relay::start_with(&lab.wks, settings(&[service.addr]), io_uring);
    for round in 0..ROUNDS {
        // in turn so that sends are taken in part, and not at all, as on a slow line, and with room
        let room = ["4096 16384 131072", "4096 16384 4194304"][round as usize % 2];
        lab.wks.sysctl("net.ipv4.tcp_wmem", room);
        let numbers = round * CONNECTIONS..(round + 1) * CONNECTIONS;
        let mut wrong: Vec<_> = std::thread::scope(|scope| {
            let clients: Vec<_> = numbers
                .map(|number| {
                    let mut stream = lab.connect(&relay, &client(number).to_string());
                    scope.spawn(move || {
                        greet(&mut stream);
                        play(number, 0, stream)
                    })
                })
                .collect();
            let ends = clients.into_iter().map(|one| one.join().expect("a client"));
            ends.filter_map(Result::err).collect()
        });
        let services =
            (0..CONNECTIONS).map(|_| reports.recv_timeout(SOON).expect("a service's end"));
        wrong.extend(services.filter_map(Result::err));
        assert!(
            wrong.is_empty(),
            "{io_uring:?}, round {round}:\n{}",
            wrong.join("\n")
        );
        relay.wait("all over", |totals| totals.active == 0);
    }
}

#[test]
fn any_order_of_events_together() {
    stress(IoUring::Auto);
}

#[test]
fn any_order_of_events_alone() {
    stress(IoUring::Off);
}
