//! Small exchanges: on lasting connections, on one connection each, or once and then idle.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::{Failures, PATIENCE, Phase, Tally, Target, Ticket, connect};
use crate::clients;
use crate::echo::send_now;

/// Bytes of a request and of its answer.
pub(crate) const SIZE: usize = 64;

/// How often a loop without events looks at the phase, and how often it looks for overdue answers, ms.
const TICK: u16 = 100;

/// What follows an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// The next one on the same connection.
    Again,
    /// A reset, and the next one on a new connection.
    Reset,
}

/// One thread of the request/response row or of the connect row.
///
/// # Errors
/// When epoll fails.
pub(crate) fn run(target: Target, lanes: usize, then: Then, ticket: Ticket<'_>) -> Result<Tally> {
    let mut tally = Tally::new();
    let mut lanes = Lanes::new(target, lanes, then == Then::Again)?;
    for index in 0..lanes.len() {
        lanes.start(index, &mut tally.failures);
    }
    let mut events = [EpollEvent::empty(); 256];
    let mut last_look = Instant::now();
    loop {
        let phase = ticket.phase();
        if phase == Phase::Stop || tally.hopeless() {
            lanes.starved(&mut tally.failures);
            return Ok(tally);
        }
        for event in lanes.wait(&mut events)? {
            let index = event.data() as usize;
            match lanes.advance(index) {
                Ok(None) => {}
                Ok(Some(latency)) => {
                    ticket.count(1);
                    if phase == Phase::Window {
                        tally.latencies.record(latency);
                    }
                    match then {
                        Then::Again => lanes.ask(index, &mut tally.failures),
                        Then::Reset => lanes.start(index, &mut tally.failures),
                    }
                }
                Err(kind) => {
                    tally.failures.add(kind);
                    lanes.start(index, &mut tally.failures);
                }
            }
        }
        if last_look.elapsed() > Duration::from_secs(1) {
            last_look = Instant::now();
            for index in lanes.overdue() {
                tally.failures.add("no answer in 5 s");
                lanes.start(index, &mut tally.failures);
            }
        }
    }
}

/// What is still unanswered after this long when the row ends has failed, though its patience is not over.
const STARVED: Duration = Duration::from_secs(1);

/// Connections that made one exchange and are idle since.
pub(crate) struct Held(Lanes);

/// Opens connections, a few at a time, makes one exchange on each and keeps them.
///
/// # Errors
/// When epoll fails, or connections fail so that the number is not reached.
pub(crate) fn hold(target: Target, number: usize, at_a_time: usize) -> Result<Held> {
    let mut lanes = Lanes::new(target, number, true)?;
    lanes.all_answer(at_a_time, Lanes::start)?;
    Ok(Held(lanes))
}

impl Held {
    /// Makes another exchange on every connection: they must still be alive.
    ///
    /// # Errors
    /// When one is not.
    pub(crate) fn check(&mut self, at_a_time: usize) -> Result<()> {
        self.0.all_answer(at_a_time, Lanes::ask)
    }
}

/// One exchange on a connection of its own for each, one after the other.
///
/// # Errors
/// When one fails.
pub(crate) fn one_by_one(target: Target, number: usize) -> Result<()> {
    let mut lanes = Lanes::new(target, number, false)?;
    for index in 0..number {
        lanes.answer(index..index + 1, 1, Lanes::start)?;
        lanes.lanes[index].stream = None;
    }
    Ok(())
}

/// Connections of one thread and its epoll instance.
struct Lanes {
    epoll: Epoll,
    target: Target,
    no_delay: bool,
    lanes: Vec<Lane>,
    /// Makes every request another one.
    number: u64,
}

/// One connection, from connecting to the answer.
struct Lane {
    stream: Option<TcpStream>,
    /// The header, where there is one, and the request; made once, used again.
    message: Vec<u8>,
    sent: usize,
    answered: usize,
    /// Complete answers so far, on this connection and those before it.
    exchanges: u64,
    since: Instant,
    /// Whether epoll also waits for room to send.
    wants_room: bool,
}

impl Lanes {
    fn new(target: Target, number: usize, no_delay: bool) -> Result<Self> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
        let lane = || Lane {
            stream: None,
            message: Vec::with_capacity(107 + SIZE),
            sent: 0,
            answered: 0,
            exchanges: 0,
            since: Instant::now(),
            wants_room: false,
        };
        Ok(Self {
            epoll,
            target,
            no_delay,
            lanes: (0..number).map(|_| lane()).collect(),
            number: 0,
        })
    }

    fn len(&self) -> usize {
        self.lanes.len()
    }

    fn wait<'e>(
        &self,
        events: &'e mut [EpollEvent],
    ) -> Result<impl Iterator<Item = EpollEvent> + use<'e>> {
        let count = match self.epoll.wait(events, TICK) {
            Err(Errno::EINTR) => 0,
            result => result.context("cannot wait for events")?,
        };
        Ok(events[..count].iter().copied())
    }

    /// A new connection with one request; the old one, if any, is reset.
    fn start(&mut self, index: usize, failures: &mut Failures) {
        self.number += 1;
        let lane = &mut self.lanes[index];
        lane.stream = None;
        lane.message.clear();
        if self.target.announce {
            clients::announce(&mut lane.message, clients::next(), self.target.address);
        }
        lane.since = Instant::now();
        let begun = connect(self.target.address, self.no_delay)
            .map_err(|error| format!("{error:#}"))
            .and_then(|stream| lane.begin(stream, &self.epoll, index, self.number));
        if let Err(kind) = begun {
            lane.stream = None;
            failures.add(kind);
        }
    }

    /// Another request on the connection that is there.
    fn ask(&mut self, index: usize, failures: &mut Failures) {
        self.number += 1;
        let lane = &mut self.lanes[index];
        lane.message.clear();
        lane.since = Instant::now();
        lane.request(self.number);
        if let Err(kind) = lane.send(&self.epoll, index) {
            lane.stream = None;
            failures.add(kind);
        }
    }

    /// Goes on where the last event left off; the time it took when the answer is complete.
    fn advance(&mut self, index: usize) -> Result<Option<Duration>, String> {
        let lane = &mut self.lanes[index];
        if lane.sent < lane.message.len() {
            lane.send(&self.epoll, index)?;
        }
        lane.receive()
    }

    /// Connections whose answer is late, and those that could not even be begun.
    fn overdue(&self) -> Vec<usize> {
        let late = |lane: &Lane| lane.stream.is_none() || lane.since.elapsed() > PATIENCE;
        (0..self.len())
            .filter(|&index| late(&self.lanes[index]))
            .collect()
    }

    /// Connections that a relay leaves aside make the others' figures better: they count as failures.
    fn starved(&self, failures: &mut Failures) {
        for lane in &self.lanes {
            if lane.exchanges == 0 {
                failures.add("not one answer");
            } else if lane.since.elapsed() > STARVED {
                failures.add("no answer for more than 1 s at the end");
            }
        }
    }

    fn all_answer(
        &mut self,
        at_a_time: usize,
        begin: impl FnMut(&mut Self, usize, &mut Failures),
    ) -> Result<()> {
        self.answer(0..self.len(), at_a_time, begin)
    }

    /// Begins an exchange on each of a range, a few at a time, and waits for all the answers.
    fn answer(
        &mut self,
        range: std::ops::Range<usize>,
        at_a_time: usize,
        mut begin: impl FnMut(&mut Self, usize, &mut Failures),
    ) -> Result<()> {
        let mut failures = Failures::default();
        let mut waiting = range.clone();
        let mut under_way = 0;
        let mut answered = 0;
        let mut events = [EpollEvent::empty(); 256];
        let mut progress = Instant::now();
        while answered < range.len() {
            while under_way < at_a_time
                && let Some(index) = waiting.next()
            {
                begin(self, index, &mut failures);
                under_way += 1;
            }
            for event in self.wait(&mut events)? {
                match self.advance(event.data() as usize) {
                    Ok(None) => {}
                    Ok(Some(_)) => {
                        answered += 1;
                        under_way -= 1;
                        progress = Instant::now();
                    }
                    Err(kind) => failures.add(kind),
                }
            }
            if let Some((kind, count)) = failures.0.first_key_value() {
                bail!(
                    "{kind} ({count} times, after {answered} of {} connections)",
                    range.len()
                );
            }
            if progress.elapsed() > PATIENCE {
                bail!(
                    "no answer in 5 s after {answered} of {} connections",
                    range.len()
                );
            }
        }
        Ok(())
    }
}

impl Lane {
    fn begin(
        &mut self,
        stream: TcpStream,
        epoll: &Epoll,
        index: usize,
        number: u64,
    ) -> Result<(), String> {
        self.wants_room = false;
        epoll
            .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))
            .map_err(|error| format!("cannot add to epoll: {error}"))?;
        self.stream = Some(stream);
        self.request(number);
        // over loopback the handshake is mostly done when connect returns, though it says EINPROGRESS
        self.send(epoll, index)
    }

    /// Appends a request that differs from every other one.
    fn request(&mut self, number: u64) {
        let start = self.message.len();
        self.message.extend_from_slice(&number.to_le_bytes());
        self.message.resize(start + SIZE, b'.');
        self.sent = 0;
        self.answered = 0;
    }

    fn send(&mut self, epoll: &Epoll, index: usize) -> Result<(), String> {
        let Some(stream) = &self.stream else {
            return Err("sent on a closed connection".to_owned());
        };
        self.sent += send_now(stream, &self.message[self.sent..])
            .map_err(|error| format!("sending: {}", error.desc()))?;
        let wants_room = self.sent < self.message.len();
        if wants_room != self.wants_room {
            self.wants_room = wants_room;
            let mut events = EpollFlags::EPOLLIN;
            events.set(EpollFlags::EPOLLOUT, wants_room);
            epoll
                .modify(stream, &mut EpollEvent::new(events, index as u64))
                .map_err(|error| format!("cannot change epoll: {error}"))?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<Duration>, String> {
        let Some(stream) = &self.stream else {
            return Err("an answer on a closed connection".to_owned());
        };
        // one byte more than wanted: a relay that sends too much is found out
        let mut buffer = [0; SIZE + 1];
        let count = match recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Ok(None),
            Err(error) => return Err(format!("receiving: {}", error.desc())),
            Ok(0) => return Err("closed before the answer".to_owned()),
            Ok(count) => count,
        };
        let expected = &self.message[self.message.len() - SIZE..][self.answered..];
        if expected.get(..count) != Some(&buffer[..count]) {
            return Err("wrong bytes".to_owned());
        }
        self.answered += count;
        if self.answered < SIZE {
            return Ok(None);
        }
        self.exchanges += 1;
        Ok(Some(self.since.elapsed()))
    }
}
