//! From the service to the proxies: every flow's socket that has something is read into one arena, and what
//! has gathered is sent with one call.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use tracing::debug;

use super::{Answering, BATCH_OF_ONE, LOANS, TURNS, Worker};
use crate::relay::batch::{Part, SegmentLimit};
use crate::relay::spp;
use crate::relay::udp::counters::{Counters, Dropped};
use crate::relay::udp::flow::{Flow, Path};
use crate::relay::udp::loan::Loan;
use crate::relay::udp::scratch::Scratch;
use crate::relay::udp::table::Id;

impl Worker {
    /// Gathers what a flow's socket has.
    pub(super) fn read_answers(&mut self, id: Id) {
        for _ in 0..TURNS {
            let Some(held) = self.flows.get(id) else {
                return;
            };
            if held.flow.owner() != self.number {
                self.forget(id);
                return;
            }
            let path = held.flow.route.path;
            if !self.answers_along(&path) {
                return;
            }
            let Some(held) = self.flows.get_mut(id) else {
                return;
            };
            let Some(socket) = &held.socket else { return };
            let Some(read) = gather(
                &held.flow,
                socket,
                &mut held.overflow,
                &mut self.scratch,
                self.to_client,
                &self.counters,
            ) else {
                return self.service_down(id);
            };
            if self.note_read(&read) {
                self.touch(id);
            }
            if !read.more {
                return;
            }
        }
        self.unfinished.push(id.to_u64());
    }

    /// Gathers what the socket of a flow has that another worker lent to this one.
    pub(super) fn read_lent(&mut self, owner: u32) {
        let common = Arc::clone(&self.common);
        let mut lent = common.loans.of(owner);
        // who has taken the flow over waits for the lock, and reads what is left
        let Some(loan) = lent.as_mut().filter(|loan| loan.flow.owner() == owner) else {
            return;
        };
        if !self.read_loan(loan) {
            self.unfinished.push(LOANS + u64::from(owner));
        }
        if loan.service_down {
            common.registry.wake(owner);
        }
        // still under the lock, for their order
        self.send_answers();
    }

    /// False when there may be more.
    fn read_loan(&mut self, loan: &mut Loan) -> bool {
        for _ in 0..TURNS {
            if !self.answers_along(&loan.flow.route.path) {
                return true;
            }
            let Some(read) = gather(
                &loan.flow,
                &loan.socket,
                &mut loan.overflow,
                &mut self.scratch,
                self.to_client,
                &self.counters,
            ) else {
                loan.service_down = true;
                return true;
            };
            if self.note_read(&read) {
                loan.flow.set_used(self.now);
            }
            if !read.more {
                return true;
            }
        }
        false
    }

    /// Whether it was anything.
    fn note_read(&mut self, read: &Read) -> bool {
        self.moved += read.answers;
        self.served += usize::from(read.answers > 0);
        read.answers > 0
    }

    /// Has room for answers to what came this way, one call sending from one socket; false where nothing answers
    /// from there any more.
    fn answers_along(&mut self, path: &Path) -> bool {
        let answering = match (self.listeners.at(path.port), path.local, &self.replies) {
            (None, Some(local), Some(_)) => Answering::From(SocketAddr::new(local.addr, path.port)),
            (Some(at), ..) => Answering::Listener(at),
            // it has gone
            (None, ..) => return false,
        };
        if answering != self.answering || self.scratch.gathered == self.scratch.outbound.slots() {
            self.send_answers();
            self.answering = answering;
        }
        true
    }

    /// Sends what was gathered.
    pub(super) fn send_answers(&mut self) {
        self.scratch.gathered = 0;
        if self.scratch.to_client.is_empty() {
            return;
        }
        let mut send = |socket: BorrowedFd<'_>| {
            let answers = &self.scratch.outbound;
            self.scratch
                .to_client
                .send(socket, answers, &mut self.to_client)
        };
        let sent = match (self.answering, &mut self.replies) {
            (Answering::From(addr), Some(replies)) => match replies.at(addr) {
                Ok(socket) => send(socket.as_fd()),
                Err(failure) => self.scratch.to_client.give_up(failure.source),
            },
            (Answering::Listener(at), _) => match self.listeners.get(at) {
                Some(listener) => send(listener.socket.as_fd()),
                None => return,
            },
            (Answering::From(_), None) => return,
        };
        self.counters.datagrams_to_client.add(sent.datagrams);
        self.counters.bytes_to_client.add(sent.bytes);
        if sent.error.is_some() {
            self.not_sent(&sent, None);
        }
    }
}

/// What was read from a flow's socket.
struct Read {
    /// Answers, or runs of them.
    answers: usize,
    /// Something may be left.
    more: bool,
}

/// Reads a flow's answers into what is still free, and puts them into the outbox; `None` when ICMP says that
/// nothing listens at its target.
fn gather(
    flow: &Flow,
    socket: &UdpSocket,
    overflow: &mut u32,
    scratch: &mut Scratch,
    limit: SegmentLimit,
    counters: &Counters,
) -> Option<Read> {
    let from = scratch.gathered;
    let room = (scratch.outbound.slots() - from).min(BATCH_OF_ONE);
    let received = match scratch.outbound.receive(socket.as_fd(), from, room) {
        Ok(received) => received,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            return Some(Read {
                answers: 0,
                more: false,
            });
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return None,
        // what else ICMP says (too big, filtered) is about one datagram; the kernel has told us
        // and forgotten it, and what waits behind it is read in the next turn
        Err(error) => {
            debug!(client.addr = %flow.route.client, %error, "the network said");
            return Some(Read {
                answers: 0,
                more: true,
            });
        }
    };
    flow.hears();
    for slot in from..from + received {
        put(slot, flow, overflow, scratch, limit, counters);
    }
    scratch.gathered += received;
    Some(Read {
        answers: received,
        more: received == room,
    })
}

/// Puts an answer, or several of one size, into the outbox.
fn put(
    slot: usize,
    flow: &Flow,
    overflow: &mut u32,
    scratch: &mut Scratch,
    limit: SegmentLimit,
    counters: &Counters,
) {
    let (arena, outbox) = (&mut scratch.outbound, &mut scratch.to_client);
    let received = arena.received(slot);
    let (control, length, truncated) = (received.control, received.bytes.len(), received.truncated);
    if let Some(lost) = control.overflow {
        let more = lost.wrapping_sub(std::mem::replace(overflow, lost));
        counters.overflow_from_target.add(more.into());
    }
    if truncated {
        counters.lose(Dropped::Truncated, 1);
        return;
    }
    flow.answered(length as u64);
    let route = &flow.route;
    let envelope = route.path.answer(control.tos);
    if let Some(header) = &route.spp {
        arena.prefix(slot, header.bytes());
        outbox.push(
            envelope,
            Part::with_prefix(slot, spp::LENGTH, length),
            limit,
        );
        return;
    }
    let size = control.segment.map_or(length, usize::from).max(1);
    let mut from = 0;
    loop {
        let part = (length - from).min(size);
        outbox.push(envelope, Part::new(slot, from, part), limit);
        from += part;
        if from >= length {
            return;
        }
    }
}
