//! Bulk: as much as goes, both ways at once, on every connection.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::{PATIENCE, Phase, Tally, Target, Ticket, connect};
use crate::clients;
use crate::echo::send_now;

/// The stream is this many bytes over and over: no eight of them in a row occur twice.
const PERIOD: usize = 64 << 10;
/// At most so much in one system call.
const CHUNK: usize = 256 << 10;
/// How often a loop without events looks at the phase, ms.
const TICK: u16 = 100;
/// How long what is under way at the end may take to arrive, as long as something arrives.
const DRAIN: Duration = Duration::from_secs(60);

/// One thread of the row: sends until the phase ends, then waits for everything that is under way.
///
/// # Errors
/// When epoll fails.
pub(crate) fn run(target: Target, lanes: usize, ticket: Ticket<'_>) -> Result<Tally> {
    let mut tally = Tally::new();
    let pattern = pattern();
    let mut buffer = vec![0; CHUNK];
    let mut events = [EpollEvent::empty(); 64];
    let epoll =
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
    let mut lanes: Vec<_> = (0..lanes)
        .map(|index| Lane::start(target, index, &epoll))
        .collect();
    let mut deadline = None;
    let mut progress = Instant::now();
    loop {
        let stopping = ticket.phase() == Phase::Stop;
        if stopping && deadline.is_none() {
            deadline = Some(Instant::now() + DRAIN);
            for (index, lane) in lanes.iter_mut().enumerate() {
                lane.finish(&epoll, index);
            }
        }
        let count = match epoll.wait(&mut events, TICK) {
            Err(Errno::EINTR) => 0,
            result => result.context("cannot wait for events")?,
        };
        for event in &events[..count] {
            let index = event.data() as usize;
            let lane = &mut lanes[index];
            match lane.advance(event.events(), stopping, &pattern, &mut buffer) {
                Ok(0) => {}
                Ok(received) => {
                    ticket.count(received as u64);
                    progress = Instant::now();
                }
                Err(kind) => lane.fail(kind),
            }
        }
        let over = deadline.is_some_and(|deadline| Instant::now() > deadline);
        let stalled = progress.elapsed() > PATIENCE;
        if stopping && (over || stalled || lanes.iter().all(Lane::done)) {
            break;
        }
    }
    for lane in lanes {
        if let Some(kind) = lane.verdict() {
            tally.failures.add(kind);
        }
    }
    Ok(tally)
}

struct Lane {
    stream: Option<TcpStream>,
    header: Vec<u8>,
    header_sent: usize,
    /// Where in the pattern this connection begins: another connection's bytes are wrong bytes.
    offset: usize,
    sent: usize,
    received: usize,
    failure: Option<String>,
}

impl Lane {
    fn start(target: Target, index: usize, epoll: &Epoll) -> Self {
        let mut lane = Self {
            stream: None,
            header: Vec::new(),
            header_sent: 0,
            offset: index * 1009 % PERIOD,
            sent: 0,
            received: 0,
            failure: None,
        };
        if target.announce {
            clients::announce(&mut lane.header, clients::next(), target.address);
        }
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
        let begun = connect(target.address, true).and_then(|stream| {
            epoll
                .add(&stream, EpollEvent::new(interest, index as u64))
                .context("cannot add to epoll")?;
            Ok(stream)
        });
        match begun {
            Ok(stream) => lane.stream = Some(stream),
            Err(error) => lane.failure = Some(format!("{error:#}")),
        }
        lane
    }

    /// One send and one receive, as the events allow; how much was received.
    fn advance(
        &mut self,
        events: EpollFlags,
        stopping: bool,
        pattern: &[u8],
        buffer: &mut [u8],
    ) -> Result<usize, String> {
        let Some(stream) = &self.stream else {
            return Ok(0);
        };
        let sending = |error: Errno| format!("sending: {}", error.desc());
        if self.header_sent < self.header.len() {
            self.header_sent +=
                send_now(stream, &self.header[self.header_sent..]).map_err(sending)?;
        }
        let announced = self.header_sent == self.header.len();
        if announced && !stopping && events.contains(EpollFlags::EPOLLOUT) {
            let at = (self.offset + self.sent) % PERIOD;
            self.sent += send_now(stream, &pattern[at..][..CHUNK]).map_err(sending)?;
        }
        if !events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            return Ok(0);
        }
        let count = match recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Ok(0),
            Err(error) => return Err(format!("receiving: {}", error.desc())),
            Ok(0) => return Err("closed before the end".to_owned()),
            Ok(count) => count,
        };
        let at = (self.offset + self.received) % PERIOD;
        if !same_ends(&buffer[..count], &pattern[at..][..count]) {
            return Err("wrong bytes".to_owned());
        }
        self.received += count;
        Ok(count)
    }

    /// From now on only receives.
    fn finish(&mut self, epoll: &Epoll, index: usize) {
        let Some(stream) = &self.stream else { return };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        if let Err(error) = epoll.modify(stream, &mut event) {
            self.fail(format!("cannot change epoll: {error}"));
        }
    }

    fn fail(&mut self, kind: String) {
        self.stream = None;
        self.failure = Some(kind);
    }

    fn done(&self) -> bool {
        self.stream.is_none() || self.received == self.sent
    }

    fn verdict(self) -> Option<String> {
        let missing =
            || (self.received < self.sent).then(|| "stalled: bytes missing at the end".to_owned());
        let unused = || (self.received == 0).then(|| "not one byte came back".to_owned());
        self.failure.clone().or_else(unused).or_else(missing)
    }
}

/// A period and what a chunk from its last byte needs.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut period = Vec::with_capacity(PERIOD);
    while period.len() < PERIOD {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        period.extend_from_slice(&state.to_le_bytes());
    }
    period
        .iter()
        .copied()
        .cycle()
        .take(PERIOD + CHUNK)
        .collect()
}

/// Compares the first and the last eight bytes: bytes lost, doubled or swapped shift one of them, and
/// comparing everything would make the generator the slow part.
fn same_ends(one: &[u8], other: &[u8]) -> bool {
    let edge = one.len().min(8);
    one[..edge] == other[..edge] && one[one.len() - edge..] == other[other.len() - edge..]
}
