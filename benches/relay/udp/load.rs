//! The UDP load: clients in a closed loop, each with a socket of its own and some datagrams under way.
//!
//! Owns: the datagrams and what counts as lost. Must not know: which program is measured.

use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::clients;
use crate::echo::WHO;
use crate::histogram::Histogram;
use crate::namespace::Namespace;

/// Payload of a question and of its answer.
pub(super) const SIZE: usize = 100;

/// How long an answer may take before its question counts as lost.
pub(super) const PATIENCE: Duration = Duration::from_millis(250);

/// How often overdue answers are looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Where the load goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    /// The relay's address, or the service's in the direct row.
    pub(super) address: SocketAddrV4,
    /// Whether each datagram has a PROXY header in front.
    pub(super) announce: bool,
}

/// How much load, for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traffic {
    /// Clients, over all threads.
    pub(super) clients: usize,
    /// Datagrams under way of each.
    pub(super) each: usize,
    /// Threads of the generator.
    pub(super) threads: usize,
    /// Load before the window.
    pub(super) warmup: Duration,
    /// What is measured.
    pub(super) window: Duration,
}

/// What a window showed.
#[derive(Debug)]
pub(super) struct Outcome<P> {
    /// Answers in the window.
    pub(super) answers: u64,
    /// Questions given up in the window.
    pub(super) lost: u64,
    /// How long the window was.
    pub(super) window: Duration,
    /// How long the answers took, from the warm-up on.
    pub(super) latencies: Histogram,
    /// The probe at the beginning and at the end of the window.
    pub(super) probes: (P, P),
}

/// What the threads share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicU64,
    lost: AtomicU64,
}

/// Runs load and looks at the relay (`probe`) at both edges of the window.
///
/// # Errors
/// When a thread cannot work, the probe fails, or an answer is not what was asked for.
pub(super) fn run<P>(
    namespace: &Namespace,
    target: Target,
    traffic: Traffic,
    mut probe: impl FnMut() -> Result<P>,
) -> Result<Outcome<P>> {
    let shared = Shared::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..traffic.threads)
            .map(|index| {
                let share = traffic.clients / traffic.threads
                    + usize::from(index < traffic.clients % traffic.threads);
                let shared = &shared;
                scope.spawn(move || -> Result<Histogram> {
                    namespace.join()?;
                    let clients = (0..share)
                        .map(|_| Client::new(target, traffic.each))
                        .collect::<Result<Vec<_>>>()?;
                    Load::new(clients, shared)?.run()
                })
            })
            .collect();
        let mut edge = |wait: Duration| -> Result<_> {
            std::thread::sleep(wait);
            let probe = probe();
            let counts = [&shared.answers, &shared.lost].map(|of| of.load(Ordering::Relaxed));
            Ok((Instant::now(), counts, probe?))
        };
        let edges = edge(traffic.warmup).and_then(|begin| Ok((begin, edge(traffic.window)?)));
        // also when the probe failed: the threads must learn of the end
        shared.stop.store(true, Ordering::Relaxed);
        let mut latencies = Histogram::new();
        for thread in threads {
            let own = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            latencies.merge(&own);
        }
        let (begin, end) = edges?;
        Ok(Outcome {
            answers: end.1[0] - begin.1[0],
            lost: end.1[1] - begin.1[1],
            window: end.0 - begin.0,
            latencies,
            probes: (begin.2, end.2),
        })
    })
}

/// A datagram under way.
#[derive(Clone, Copy)]
struct Slot {
    /// Which one it is.
    number: u32,
    since: Instant,
}

struct Client {
    socket: UdpSocket,
    /// Header and payload; only the slot and its number differ from one datagram to the next.
    datagram: Vec<u8>,
    /// Where the payload begins.
    payload: usize,
    slots: Vec<Slot>,
}

impl Client {
    fn new(target: Target, slots: usize) -> Result<Self> {
        let socket = socket(target)?;
        socket
            .set_nonblocking(true)
            .context("cannot set O_NONBLOCK")?;
        let mut datagram = Vec::new();
        if target.announce {
            announce(&mut datagram, clients::next(), target.address);
        }
        let payload = datagram.len();
        datagram.extend((0..SIZE).map(|at| at as u8));
        let slot = Slot {
            number: 0,
            since: Instant::now(),
        };
        Ok(Self {
            socket,
            datagram,
            payload,
            slots: vec![slot; slots],
        })
    }

    /// Asks the next question of a slot.
    fn ask(&mut self, slot: usize, now: Instant) -> Result<()> {
        let own = &mut self.slots[slot];
        own.number = own.number.wrapping_add(1);
        own.since = now;
        let payload = &mut self.datagram[self.payload..];
        payload[..4].copy_from_slice(&(slot as u32).to_be_bytes());
        payload[4..8].copy_from_slice(&own.number.to_be_bytes());
        match self.socket.send(&self.datagram) {
            Ok(_) => Ok(()),
            // the send buffer is full: not sent is lost
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error).context("cannot send"),
        }
    }

    /// Which slot an answer is for, and how long it took; `None` when it was given up before.
    fn answered(&self, answer: &[u8], now: Instant) -> Result<Option<(usize, Duration)>> {
        let asked = &self.datagram[self.payload..];
        if answer.len() != SIZE || answer[8..] != asked[8..] {
            bail!("an answer of {} bytes that was not asked for", answer.len());
        }
        let word = |at: usize| {
            u32::from_be_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]])
        };
        let slot = word(0) as usize;
        let Some(own) = self.slots.get(slot) else {
            bail!("another client's answer");
        };
        Ok((own.number == word(4)).then(|| (slot, now - own.since)))
    }
}

/// One thread's clients.
struct Load<'a> {
    clients: Vec<Client>,
    epoll: Epoll,
    shared: &'a Shared,
    latencies: Histogram,
    /// Answers that are not in [`Shared`] yet.
    answers: u64,
}

impl<'a> Load<'a> {
    fn new(clients: Vec<Client>, shared: &'a Shared) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
        for (at, client) in (0u64..).zip(&clients) {
            epoll
                .add(&client.socket, EpollEvent::new(EpollFlags::EPOLLIN, at))
                .context("cannot wait for a socket")?;
        }
        Ok(Self {
            clients,
            epoll,
            shared,
            latencies: Histogram::new(),
            answers: 0,
        })
    }

    fn run(mut self) -> Result<Histogram> {
        let mut now = Instant::now();
        for client in &mut self.clients {
            for slot in 0..client.slots.len() {
                client.ask(slot, now)?;
            }
        }
        let mut events = [EpollEvent::empty(); 256];
        let mut looked = now;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let ready = match self.epoll.wait(&mut events, LOOK.as_millis() as u16) {
                Err(Errno::EINTR) => continue,
                result => result.context("cannot wait for events")?,
            };
            now = Instant::now();
            for event in &events[..ready] {
                self.answers_of(event.data() as usize, &mut now)?;
            }
            let answers = std::mem::take(&mut self.answers);
            self.shared.answers.fetch_add(answers, Ordering::Relaxed);
            if now - looked >= LOOK {
                looked = now;
                self.give_up(now)?;
            }
        }
        Ok(self.latencies)
    }

    /// Reads a client's answers, asking the next question after each, until there are none or others had to
    /// wait for long enough.
    fn answers_of(&mut self, at: usize, now: &mut Instant) -> Result<()> {
        let mut buffer = [0; 256];
        let client = &mut self.clients[at];
        for _ in 0..2 * client.slots.len() {
            let length = match client.socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot receive"),
            };
            *now = Instant::now();
            if let Some((slot, took)) = client.answered(&buffer[..length], *now)? {
                self.latencies.record(took);
                self.answers += 1;
                client.ask(slot, *now)?;
            }
            if client.slots.len() == 1 {
                return Ok(());
            }
        }
        Ok(())
    }

    fn give_up(&mut self, now: Instant) -> Result<()> {
        for client in &mut self.clients {
            for slot in 0..client.slots.len() {
                if now.saturating_duration_since(client.slots[slot].since) > PATIENCE {
                    self.shared.lost.fetch_add(1, Ordering::Relaxed);
                    client.ask(slot, now)?;
                }
            }
        }
        Ok(())
    }
}

/// Asks once who the service sees.
///
/// # Errors
/// When there is no answer, or it is not the announced client's address.
pub(super) fn who_am_i(target: Target) -> Result<()> {
    let client = clients::next();
    let seen = ask_who(&socket(target)?, target, client)?;
    if target.announce && seen.ip() != *client.ip() {
        bail!("the service sees {seen} instead of {client}");
    }
    Ok(())
}

/// Whether two clients behind one proxy port are told apart.
///
/// # Errors
/// When there is no answer.
pub(super) fn tells_apart(target: Target) -> Result<bool> {
    let socket = socket(target)?;
    for _ in 0..2 {
        let client = clients::next();
        if ask_who(&socket, target, client)?.ip() != *client.ip() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn ask_who(socket: &UdpSocket, target: Target, client: SocketAddrV4) -> Result<SocketAddr> {
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .context("cannot set a time limit")?;
    let mut datagram = Vec::new();
    if target.announce {
        announce(&mut datagram, client, target.address);
    }
    datagram.extend_from_slice(WHO);
    socket
        .send(&datagram)
        .context("cannot ask who the service sees")?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer).context("no answer")?;
    let text = std::str::from_utf8(&answer[..length]).context("the answer is not text")?;
    text.parse()
        .with_context(|| format!("the answer '{text}' is not an address"))
}

fn socket(target: Target) -> Result<UdpSocket> {
    let own = SocketAddrV4::new(*target.address.ip(), 0);
    let socket = UdpSocket::bind(own).context("cannot bind")?;
    socket.connect(target.address).context("cannot connect")?;
    Ok(socket)
}

/// A PROXY v2 header of a UDP client.
fn announce(out: &mut Vec<u8>, client: SocketAddrV4, relay: SocketAddrV4) {
    out.extend_from_slice(b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c");
    out.extend_from_slice(&client.ip().octets());
    out.extend_from_slice(&relay.ip().octets());
    out.extend_from_slice(&client.port().to_be_bytes());
    out.extend_from_slice(&relay.port().to_be_bytes());
}
