//! The connections of one worker thread, as they can be asked for: the open ones, and a bounded memory
//! of those that ended.
//!
//! Owns: what is noted about a connection, and ending one from outside. Must not know: sockets.
//!
//! Nothing here is shared between threads: the thread writes plain cells as it relays and reads them when
//! a message asks. What is noted for every connection counts in the memory of an idle one; the text that
//! few proxies send is boxed, and there only when it was sent.

mod entry;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use super::settings::Settings;
use super::view::{Connection, Ended, Filter, Reason};
use crate::model::{InstanceName, ProxyAddr};

pub(super) use entry::{Entry, Moment};

/// How many connections that ended a thread remembers: under a megabyte, and minutes of a busy relay.
const REMEMBERED: usize = 4096;

/// Connections that ended, of every relay on one thread, oldest first.
#[derive(Debug, Default)]
pub(super) struct Recent(RefCell<VecDeque<Past>>);

#[derive(Debug)]
struct Past {
    entry: Rc<Entry>,
    id: u64,
    at: Moment,
    reason: Reason,
}

impl Recent {
    fn push(&self, past: Past) {
        let mut all = self.0.borrow_mut();
        if all.len() == REMEMBERED {
            all.pop_front();
        }
        all.push_back(past);
    }

    /// Those of one instance that are meant. By name: a relay that took over from another is asked about
    /// its predecessor's connections too.
    pub(super) fn of(&self, instance: &InstanceName, filter: &Filter) -> Vec<Connection> {
        let now = Moment::now();
        let all = self.0.borrow();
        all.iter()
            .filter(|past| past.entry.settings.name == *instance)
            .map(|past| past.row(now))
            .filter(|row| filter.matches(row))
            .collect()
    }
}

impl Past {
    fn row(&self, now: Moment) -> Connection {
        Connection {
            age_ms: self.at.since(self.entry.accepted),
            idle_ms: self.at.since(self.entry.moved.get()),
            ended: Some(Ended {
                ago_ms: now.since(self.at),
                reason: self.reason.name().to_owned(),
            }),
            ..self.entry.row(self.id, now)
        }
    }
}

/// The open connections of one relay on one thread.
#[derive(Debug)]
pub(super) struct Registry {
    number: u64,
    next: Cell<u32>,
    open: RefCell<Vec<Open>>,
    left: Cell<Left>,
}

/// How many connections left, in a second that began at this moment and in the one before it.
#[derive(Debug, Clone, Copy)]
struct Left {
    since: Moment,
    now: u32,
    before: u32,
}

impl Left {
    const NOBODY: Self = Self {
        since: Moment(0),
        now: 0,
        before: 0,
    };

    /// As it is at a moment, before anybody leaves then.
    fn at(self, moment: Moment) -> Self {
        let before = match moment.since(self.since) {
            0..1000 => return self,
            1000..2000 => self.now,
            _ => 0,
        };
        Self {
            since: moment,
            now: 0,
            before,
        }
    }
}

#[derive(Debug)]
struct Open {
    entry: Rc<Entry>,
    number: u32,
    /// Wakes the connection's task to find that it is killed.
    waker: Option<Waker>,
}

/// The upper half of the numbers that a relay gives its connections or flows, once.
pub(super) fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            number: next_number(),
            next: Cell::new(0),
            open: RefCell::default(),
            left: Cell::new(Left::NOBODY),
        }
    }
}

impl Registry {
    /// A connection was accepted.
    pub(super) fn enter(&self, proxy: ProxyAddr, port: u16, settings: Arc<Settings>) -> Rc<Entry> {
        let mut open = self.open.borrow_mut();
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        // descriptors run out long before
        let slot = open.len() as u32;
        let entry = Rc::new(Entry::new(proxy, port, settings, slot));
        open.push(Open {
            entry: Rc::clone(&entry),
            number,
            waker: None,
        });
        entry
    }

    /// Makes sure that [`Registry::kill`] finds the task of a connection.
    pub(super) fn woken_by(&self, entry: &Entry, waker: &Waker) {
        if let Some(open) = self.open.borrow_mut().get_mut(entry.slot.get() as usize) {
            open.waker = Some(waker.clone());
        }
    }

    fn id(&self, number: u32) -> u64 {
        self.number << 32 | u64::from(number)
    }

    /// A connection is over. Remembered when it named a client: others answer no question.
    pub(super) fn leave(&self, entry: &Rc<Entry>, recent: &Recent) {
        let at = Moment::now();
        let mut left = self.left.get().at(at);
        left.now = left.now.saturating_add(1);
        self.left.set(left);
        let mut open = self.open.borrow_mut();
        let slot = entry.slot.get() as usize;
        // with its waker, which keeps the task's memory
        let number = open.swap_remove(slot).number;
        if let Some(moved) = open.get(slot) {
            moved.entry.slot.set(slot as u32);
        }
        // the list gives memory back after a rush, not at every swing
        if open.len() < open.capacity() / 4 && open.capacity() > 64 {
            let half = open.capacity() / 2;
            open.shrink_to(half);
        }
        if entry.client().is_some() {
            recent.push(Past {
                entry: Rc::clone(entry),
                id: self.id(number),
                at,
                reason: entry.reason.get().unwrap_or(Reason::Cut),
            });
        }
    }

    /// How many connections left within the last second or two.
    pub(super) fn left_lately(&self) -> u64 {
        let left = self.left.get().at(Moment::now());
        u64::from(left.now) + u64::from(left.before)
    }

    /// The open connections that are meant.
    pub(super) fn open(&self, filter: &Filter) -> Vec<Connection> {
        self.each(filter, |_| {})
    }

    /// Ends the open connections that are meant, when their tasks come round, and returns them.
    pub(super) fn kill(&self, filter: &Filter) -> Vec<Connection> {
        self.each(filter, |open| {
            open.entry.killed.set(true);
            if let Some(waker) = &open.waker {
                waker.wake_by_ref();
            }
        })
    }

    fn each(&self, filter: &Filter, act: impl Fn(&Open)) -> Vec<Connection> {
        let now = Moment::now();
        let open = self.open.borrow();
        open.iter()
            .filter_map(|one| {
                let row = one.entry.row(self.id(one.number), now);
                filter.matches(&row).then(|| {
                    act(one);
                    row
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_left_is_forgotten_after_two_seconds() {
        let at = |ms: u32| Moment(u32::MAX - 50).0.wrapping_add(ms / 10);
        let left = Left {
            since: Moment(at(0)),
            now: 7,
            before: 3,
        };
        let seen = |ms| {
            let left = left.at(Moment(at(ms)));
            (left.now, left.before)
        };
        assert_eq!(seen(990), (7, 3));
        assert_eq!(seen(1000), (0, 7));
        assert_eq!(seen(1990), (0, 7));
        assert_eq!(seen(2000), (0, 0));
    }
}
