//! The load: threads of epoll loops with buffers made beforehand, because a generator that is slower than
//! the relay measures itself. The direct row, made by the same loops, shows how fast they are.
//!
//! Owns: the phases of a measurement and the counters read at their edges. Must not know: which program is
//! measured.

pub(crate) mod bulk;
pub(crate) mod exchange;

use std::collections::BTreeMap;
use std::net::{SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use crate::histogram::Histogram;
use crate::namespace::Namespace;

/// How long an answer may take before it counts as a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// After so many failures a thread gives up: the row has failed, and a relay that refuses everything would
/// be hammered for nothing.
const TOO_MANY: u64 = 1000;

/// Where the load goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// The relay's address, or the service's in the direct row.
    pub(crate) address: SocketAddrV4,
    /// Whether a PROXY header comes first.
    pub(crate) announce: bool,
}

/// How much load, for how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traffic {
    /// Connections at a time, over all threads.
    pub(crate) connections: usize,
    /// Threads of the generator.
    pub(crate) threads: usize,
    /// Load before the window.
    pub(crate) warmup: Duration,
    /// What is measured.
    pub(crate) window: Duration,
}

/// What the connections do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Send as much as goes and read it back; the unit is a byte that came back.
    Bulk,
    /// 64 bytes there and back, again and again; the unit is an exchange.
    Exchange,
    /// Connect, one exchange, reset; the unit is a connection.
    Connect,
}

/// What went wrong, and how often.
#[derive(Debug, Clone, Default)]
pub(crate) struct Failures(pub(crate) BTreeMap<String, u64>);

impl Failures {
    /// One more of a kind.
    pub(crate) fn add(&mut self, kind: impl Into<String>) {
        *self.0.entry(kind.into()).or_default() += 1;
    }

    /// All of another.
    pub(crate) fn merge(&mut self, other: Self) {
        for (kind, count) in other.0 {
            *self.0.entry(kind).or_default() += count;
        }
    }

    /// Of all kinds.
    pub(crate) fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// What a window showed.
#[derive(Debug)]
pub(crate) struct Outcome<P> {
    /// Units of work done in the window.
    pub(crate) units: u64,
    /// How long the window was.
    pub(crate) window: Duration,
    /// How long the exchanges of the window took.
    pub(crate) latencies: Histogram,
    /// Everything that failed, also before and after the window.
    pub(crate) failures: Failures,
    /// The probe at the beginning and at the end of the window.
    pub(crate) probes: (P, P),
}

/// Runs load and looks at the relay (`probe`) at both edges of the window.
///
/// # Errors
/// When a thread cannot work or the probe fails; what happens to connections is in [`Outcome::failures`].
pub(crate) fn run<P>(
    namespace: &Namespace,
    target: Target,
    traffic: Traffic,
    work: Work,
    mut probe: impl FnMut() -> Result<P>,
) -> Result<Outcome<P>> {
    let shared = Shared::new(traffic.threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..traffic.threads)
            .map(|index| {
                let share = share(traffic.connections, traffic.threads, index);
                let ticket = Ticket {
                    shared: &shared,
                    index,
                };
                scope.spawn(move || -> Result<Tally> {
                    namespace.join()?;
                    match work {
                        Work::Bulk => bulk::run(target, share, ticket),
                        Work::Exchange => {
                            exchange::run(target, share, exchange::Then::Again, ticket)
                        }
                        Work::Connect => {
                            exchange::run(target, share, exchange::Then::Reset, ticket)
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(traffic.warmup);
        let begin = edge(&shared, Phase::Window, &mut probe);
        if begin.is_ok() {
            std::thread::sleep(traffic.window);
        }
        let end = edge(&shared, Phase::Stop, &mut probe);
        let mut latencies = Histogram::new();
        let mut failures = Failures::default();
        for thread in threads {
            let tally = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            latencies.merge(&tally.latencies);
            failures.merge(tally.failures);
        }
        let (begin, end) = (begin?, end?);
        Ok(Outcome {
            units: end.units - begin.units,
            window: end.at - begin.at,
            latencies,
            failures,
            probes: (begin.probe, end.probe),
        })
    })
}

/// What is read at an edge of the window.
struct Edge<P> {
    at: Instant,
    units: u64,
    probe: P,
}

fn edge<P>(shared: &Shared, next: Phase, probe: &mut impl FnMut() -> Result<P>) -> Result<Edge<P>> {
    let probe = probe();
    let (at, units) = (Instant::now(), shared.units());
    // also when the probe failed: the threads must learn of the end
    shared.enter(next);
    Ok(Edge {
        at,
        units,
        probe: probe?,
    })
}

fn share(all: usize, parts: usize, index: usize) -> usize {
    all / parts + usize::from(index < all % parts)
}

/// Where a measurement stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Load without measuring.
    Warmup,
    /// Latencies count.
    Window,
    /// Threads end.
    Stop,
}

/// What the threads share.
struct Shared {
    phase: AtomicU8,
    units: Vec<Counter>,
}

/// A counter on a cache line of its own: threads that count must not slow each other.
#[repr(align(128))]
struct Counter(AtomicU64);

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            phase: AtomicU8::new(Phase::Warmup as u8),
            units: (0..threads).map(|_| Counter(AtomicU64::new(0))).collect(),
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    fn units(&self) -> u64 {
        self.units
            .iter()
            .map(|counter| counter.0.load(Ordering::Relaxed))
            .sum()
    }
}

/// One thread's view of what is shared.
#[derive(Clone, Copy)]
pub(crate) struct Ticket<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Ticket<'_> {
    /// Where the measurement stands.
    pub(crate) fn phase(self) -> Phase {
        match self.shared.phase.load(Ordering::Relaxed) {
            0 => Phase::Warmup,
            1 => Phase::Window,
            _ => Phase::Stop,
        }
    }

    /// So many units more.
    pub(crate) fn count(self, units: u64) {
        // only this thread writes it
        let counter = &self.shared.units[self.index].0;
        counter.store(counter.load(Ordering::Relaxed) + units, Ordering::Relaxed);
    }
}

/// What one thread saw.
pub(crate) struct Tally {
    pub(crate) latencies: Histogram,
    pub(crate) failures: Failures,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            latencies: Histogram::new(),
            failures: Failures::default(),
        }
    }

    /// Whether the row is lost.
    pub(crate) fn hopeless(&self) -> bool {
        self.failures.total() >= TOO_MANY
    }
}

/// Begins to connect. The socket resets when it is closed, so that the load leaves no TIME_WAIT behind.
///
/// # Errors
/// When there is no descriptor, or the refusal came at once.
pub(crate) fn connect(address: SocketAddrV4, no_delay: bool) -> Result<TcpStream> {
    let socket = Socket::new(
        Domain::IPV4,
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )
    .context("cannot make a socket")?;
    socket
        .set_linger(Some(Duration::ZERO))
        .context("cannot set SO_LINGER")?;
    if no_delay {
        socket
            .set_tcp_nodelay(true)
            .context("cannot set TCP_NODELAY")?;
    }
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
            Err(error).context("cannot connect")
        }
        _ => Ok(socket.into()),
    }
}
