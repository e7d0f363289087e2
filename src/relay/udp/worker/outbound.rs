//! From the service to the proxies: every flow's socket that has something is read into one arena, and what
//! has gathered is sent with one call.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use tracing::debug;

use super::{Answering, BATCH_OF_ONE, Held, TURNS, Worker};
use crate::relay::batch::{Part, SegmentLimit};
use crate::relay::spp;
use crate::relay::udp::counters::{Counters, Dropped};
use crate::relay::udp::scratch::Scratch;
use crate::relay::udp::table::Id;

impl Worker {
    /// Gathers what a flow's socket has.
    pub(super) fn read_answers(&mut self, id: Id) {
        for _ in 0..TURNS {
            if self.scratch.gathered == self.scratch.outbound.slots() {
                self.send_answers();
            }
            let Some(held) = self.flows.get_mut(id) else {
                return;
            };
            if held.flow.owner() != self.number {
                self.forget(id);
                return;
            }
            // one call sends from one socket
            let path = &held.flow.route.path;
            let answering = match (self.by_port.get(&path.port), path.local, &self.replies) {
                (None, Some(local), Some(_)) => {
                    Answering::From(SocketAddr::new(local.addr, path.port))
                }
                (at, ..) => Answering::Listener(at.copied().unwrap_or(0)),
            };
            if answering != self.answering {
                self.send_answers();
                self.answering = answering;
            }
            let Some(held) = self.flows.get_mut(id) else {
                return;
            };
            let Some(socket) = &held.socket else { return };
            let room = (self.scratch.outbound.slots() - self.scratch.gathered).min(BATCH_OF_ONE);
            let received =
                match self
                    .scratch
                    .outbound
                    .receive(socket.as_fd(), self.scratch.gathered, room)
                {
                    Ok(received) => received,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        self.service_down(id);
                        return;
                    }
                    // what else ICMP says (too big, filtered) is about one datagram; the kernel has told us
                    // and forgotten it, and what waits behind it is read in the next turn
                    Err(error) => {
                        debug!(client.addr = %held.flow.route.client, %error, "the network said");
                        continue;
                    }
                };
            self.moved += received;
            self.served += 1;
            held.asked = false;
            held.answered = true;
            for slot in self.scratch.gathered..self.scratch.gathered + received {
                gather(
                    slot,
                    held,
                    &mut self.scratch,
                    self.to_client,
                    &self.counters,
                );
            }
            self.scratch.gathered += received;
            self.touch(id);
            if received < room {
                return;
            }
        }
        self.unfinished.push(id);
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

/// Puts an answer, or several of one size, into the outbox.
fn gather(
    slot: usize,
    held: &mut Held,
    scratch: &mut Scratch,
    limit: SegmentLimit,
    counters: &Counters,
) {
    let (arena, outbox) = (&mut scratch.outbound, &mut scratch.to_client);
    let received = arena.received(slot);
    let (control, length, truncated) = (received.control, received.bytes.len(), received.truncated);
    if let Some(lost) = control.overflow {
        let more = lost.wrapping_sub(std::mem::replace(&mut held.overflow, lost));
        counters.overflow_from_target.add(more.into());
    }
    if truncated {
        counters.lose(Dropped::Truncated, 1);
        return;
    }
    held.flow.answered(length as u64);
    let route = &held.flow.route;
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
