//! When a worker lends a flow's answers to another, and how it gets them back.
//!
//! A flow that brings so much that its worker works a good part of the time, and that has the worker to itself,
//! is lent to one that rests meanwhile, whatever else it may have had to do: its processor would lie idle. Both
//! are judged by their CPU time over a moment.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;
use tracing::trace;

use super::{LOANS, Worker};
use crate::relay::udp::loan::{Loan, Offer};
use crate::relay::udp::table::Id;

/// The moment, in milliseconds.
const MOMENT: u64 = 10;
/// What part of it makes a worker busy, and what makes it rest, as divisors.
const BUSY: u32 = 4;
/// Below this part a worker takes back what it lent: there is not enough to share.
const SLOW: u32 = 16;
/// How long a loan lasts at most, in milliseconds: only while it is back can be seen whether the other worker
/// still rests but for it. So long is it, too, from one to the next: a flow that is nearly all answers leaves
/// its worker with less than [`SLOW`], and would be lent and taken back all the time.
const LEASE: u64 = 1_000;

/// What a worker lends, and what it goes by.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// When the moment began, in milliseconds since the relay's start.
    since: u64,
    /// The thread's CPU time then.
    cpu: Duration,
    /// The flows that brought something since.
    company: Company,
    stage: Stage,
    /// Until when the last loan may last, and no other begins, in milliseconds since the relay's start.
    until: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Company {
    #[default]
    Nobody,
    Only(Id),
    Several,
}

impl Company {
    fn and(self, id: Id) -> Self {
        match self {
            Self::Nobody => Self::Only(id),
            Self::Only(only) if only == id => self,
            Self::Only(_) | Self::Several => Self::Several,
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
enum Stage {
    #[default]
    Own,
    /// Watches another worker; its CPU time when that began.
    Watching {
        other: u32,
        cpu: Duration,
    },
    Lent(Id),
}

impl Worker {
    /// Notes which flows have brought something.
    pub(super) fn note_company(&mut self) {
        let touched = self.scratch.touched.iter();
        self.lending.company = touched.fold(self.lending.company, |all, id| all.and(*id));
    }

    /// Before anything else in a round: what the table's order of use cannot know by itself.
    pub(super) fn touch_lent(&mut self) {
        if let Some(id) = self.lent()
            && let Some(held) = self.flows.get(id)
        {
            let used = held.flow.used();
            self.flows.touch(id, used);
        }
    }

    /// Once a round: lends, or takes back.
    pub(super) fn lend(&mut self) {
        let passed = self.now - self.lending.since;
        if passed < MOMENT || self.common.loans.workers() < 2 {
            return;
        }
        let Some(cpu) = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID) else {
            return;
        };
        let spent = cpu.saturating_sub(std::mem::replace(&mut self.lending.cpu, cpu));
        self.lending.since = self.now;
        let company = std::mem::take(&mut self.lending.company);
        let passed = Duration::from_millis(passed);
        match (self.lending.stage, company) {
            (Stage::Lent(flow), Company::Only(only))
                if only == flow && spent >= passed / SLOW && self.now < self.lending.until => {}
            (Stage::Lent(flow), _) => self.take_back(flow),
            (Stage::Watching { other, cpu }, Company::Only(flow)) if spent >= passed / BUSY => {
                self.lending.stage = Stage::Own;
                let spent = self.cpu_of(other).map(|now| now.saturating_sub(cpu));
                match spent {
                    Some(spent) if spent <= passed / BUSY => self.lend_to(flow, other),
                    _ => self.watch_next(other),
                }
            }
            (Stage::Own, Company::Only(_))
                if spent >= passed / BUSY && self.now >= self.lending.until =>
            {
                self.watch_next(self.number);
            }
            (Stage::Own | Stage::Watching { .. }, _) => self.lending.stage = Stage::Own,
        }
    }

    fn watch_next(&mut self, after: u32) {
        let workers = self.common.loans.workers();
        let next = (after + 1) % workers;
        let other = match next == self.number {
            true => (next + 1) % workers,
            false => next,
        };
        if let Some(cpu) = self.cpu_of(other) {
            self.lending.stage = Stage::Watching { other, cpu };
        }
    }

    fn cpu_of(&self, worker: u32) -> Option<Duration> {
        cpu_time(self.common.loans.offer(worker)?.clock)
    }

    fn lend_to(&mut self, id: Id, reader: u32) {
        let (Some(held), Some(offer)) = (self.flows.get(id), self.common.loans.offer(reader))
        else {
            return;
        };
        let Some(socket) = &held.socket else { return };
        // an answer leaves from the port that was asked, and there may not be a listener for each at each worker
        if !offer.has_port(held.flow.route.path.port) {
            return;
        }
        let loan = Loan {
            flow: Arc::clone(&held.flow),
            socket: Arc::clone(socket),
            reader,
            overflow: held.overflow,
            service_down: false,
        };
        // it is in there: there was something to be sent, and so to be answered
        let _ = self.epoll.delete(&*loan.socket);
        // what is left there is the reader's
        self.unfinished.retain(|number| *number != id.to_u64());
        let event = LOANS + u64::from(self.number);
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, event);
        let client = loan.flow.route.client;
        self.lending.stage = Stage::Lent(id);
        self.lending.until = self.now + LEASE;
        if self.common.loans.lend(self.number, loan, event) {
            self.counters.flows_lent.add(1);
            trace!(client.addr = %client, reader, "another worker reads the answers");
        } else {
            self.take_back(id);
        }
    }

    /// Reads a flow's answers here again, if they are lent.
    pub(super) fn take_back(&mut self, id: Id) {
        if self.lent() != Some(id) {
            return;
        }
        let Some(held) = self.flows.get(id) else {
            return;
        };
        // whoever has taken the flow over watches it by himself
        if held.flow.owner() != self.number {
            return self.forget(id);
        }
        let loan = self.end_loan(id);
        let Some(held) = self.flows.get_mut(id) else {
            return;
        };
        if let Some(loan) = loan {
            held.overflow = loan.overflow;
            if loan.service_down {
                return self.service_down(id);
            }
        }
        if let Some(socket) = held.socket.take() {
            self.watch(id, socket);
        }
    }

    /// Takes back a flow whose reader was told that nothing listens at its target.
    pub(super) fn take_back_what_is_down(&mut self) {
        if let Some(id) = self.lent()
            && self.common.loans.is_down(self.number)
        {
            self.take_back(id);
        }
    }

    /// Lends nothing any more, unless something comes from a proxy.
    pub(super) fn take_all_back(&mut self) {
        if let Some(id) = self.lent() {
            self.take_back(id);
        }
        self.lending = Lending::default();
    }

    /// Nobody else reads from a flow's socket, or has it, after this.
    pub(super) fn end_loan(&mut self, id: Id) -> Option<Loan> {
        if self.lent() != Some(id) {
            return None;
        }
        self.lending.stage = Stage::Own;
        let loan = self.common.loans.end(self.number)?;
        trace!(client.addr = %loan.flow.route.client, "no other worker reads the answers");
        Some(loan)
    }

    /// The flow that is lent.
    pub(super) fn lent(&self) -> Option<Id> {
        match self.lending.stage {
            Stage::Lent(flow) => Some(flow),
            Stage::Own | Stage::Watching { .. } => None,
        }
    }

    /// What the others may use. On the worker's own thread.
    pub(super) fn offer(&self) -> Offer {
        Offer {
            epoll: self.epoll.shared(),
            ports: Mutex::new(self.listeners.ports()),
            clock: thread_clock(),
        }
    }
}

/// The CPU time of the calling thread, for any thread to read: CPUCLOCK_SCHED with CPUCLOCK_PERTHREAD_MASK of
/// Linux' include/linux/posix-timers.h, as pthread_getcpuclockid(3) makes it.
fn thread_clock() -> ClockId {
    ClockId::from_raw(!gettid().as_raw() << 3 | 4 | 2)
}

/// `None` once the thread has ended.
fn cpu_time(clock: ClockId) -> Option<Duration> {
    clock_gettime(clock).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone() {
        let [one, two] = [1, 2].map(|number| Id::from_u64(number).unwrap());
        let all = |ids: &[Id]| ids.iter().fold(Company::Nobody, |all, id| all.and(*id));
        assert_eq!(all(&[]), Company::Nobody);
        assert_eq!(all(&[one, one]), Company::Only(one));
        for several in [[one, two, two], [one, one, two], [one, two, one]] {
            assert_eq!(all(&several), Company::Several);
        }
    }

    #[test]
    fn another_threads_cpu_time() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(thread_clock()).unwrap();
            let own = || cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
            while own() < Duration::from_millis(20) {}
            tell.send(thread_clock()).unwrap();
            let _ = ended.recv();
        });
        let clock = told.recv().unwrap();
        assert_eq!(told.recv().unwrap(), clock);
        let spent = cpu_time(clock).unwrap();
        assert!(spent >= Duration::from_millis(20), "{spent:?}");
        // waiting costs nothing
        std::thread::sleep(Duration::from_millis(50));
        assert!(cpu_time(clock).unwrap() - spent < Duration::from_millis(20));
        drop(end);
        thread.join().unwrap();
        assert_eq!(cpu_time(clock), None);
    }
}
