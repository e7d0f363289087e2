//! From the proxies to the service: a batch is read, each datagram is decoded and queued at its flow, then
//! each flow that got something sends it with one call.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;

use tracing::debug;

use super::lifecycle::asked;
use super::{Known, TURNS, Worker, client_of};
use crate::model::UdpHeader;
use crate::relay::batch::{Envelope, Part, Receiver, Sent, is_too_big};
use crate::relay::counters::Refusal;
use crate::relay::udp::counters::{Dropped, Ended};
use crate::relay::udp::datagram::{self, Client, Datagram};
use crate::relay::udp::flow::{Key, Path};
use crate::relay::udp::scratch::{NONE, Queued};
use crate::relay::udp::table::Id;

/// How much of a datagram that cannot be passed on is looked at, to say what it is.
const SHOWN: usize = 512;

impl Worker {
    pub(super) fn read_listener(&mut self, at: usize) -> io::Result<()> {
        for _ in 0..TURNS {
            let Some(listener) = self.listeners.get(at) else {
                return Ok(());
            };
            let batch = self.scratch.inbound.slots();
            let received = match self
                .scratch
                .inbound
                .receive(listener.socket.as_fd(), 0, batch)
            {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EINVAL) => {
                        return Err(error);
                    }
                    // memory is short, or an error of the network: the next datagram may pass
                    _ => {
                        debug!(%error, "cannot receive");
                        return Ok(());
                    }
                },
            };
            self.moved += received;
            for slot in 0..received {
                self.take_in(at, slot);
            }
            self.send_queued();
            if received < batch {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What the kernel put into one slot: one datagram or several of one size.
    pub(super) fn take_in(&mut self, listener: usize, slot: usize) {
        let received = self.scratch.inbound.received(slot);
        let (control, length) = (received.control, received.bytes.len());
        let (truncated, peer) = (received.truncated, received.peer);
        if let (Some(lost), Some(listener)) = (control.overflow, self.listeners.get_mut(listener)) {
            let more = lost.wrapping_sub(std::mem::replace(&mut listener.overflow, lost));
            self.counters.overflow_from_proxy.add(more.into());
        }
        let Some(peer) = peer else { return };
        let path = Path {
            peer,
            local: control.local,
            port: control
                .port
                .or_else(|| Some(self.listeners.get(listener)?.port))
                .unwrap_or(0),
        };
        if !self.allows(&path) {
            return;
        }
        if truncated {
            self.drop_datagram(
                Dropped::Truncated,
                &path,
                None,
                &"dropped: cut off on receiving",
            );
            return;
        }
        let size = control.segment.map_or(length, usize::from).max(1);
        let mut from = 0;
        loop {
            let part = (length - from).min(size);
            self.take(&path, control.tos, slot, from, part);
            from += part;
            if from >= length {
                return;
            }
        }
    }

    pub(super) fn allows(&mut self, path: &Path) -> bool {
        let proxy = path.proxy();
        let allowed = match self.known {
            Some(known) if known.proxy == proxy.ip() => known.allowed,
            _ => {
                let allowed = self.settings.allow.allows(proxy.ip());
                self.known = Some(Known {
                    proxy: proxy.ip(),
                    allowed,
                });
                allowed
            }
        };
        if !allowed {
            let message = "refused: the proxy is not on the allow list";
            self.refuse(Refusal::ProxyNotAllowed, proxy, None, &message);
        }
        allowed
    }

    /// One datagram: whose it is, and into that flow's queue.
    #[inline]
    pub(super) fn take(&mut self, path: &Path, tos: u8, slot: usize, from: usize, length: usize) {
        let mode = self.settings.header;
        let bytes = self.scratch.inbound.bytes(Part::new(slot, from, length));
        let (id, payload) = match datagram::read(mode, bytes) {
            Ok(Datagram::Headed { payload, .. })
                if payload == length && mode != UdpHeader::First =>
            {
                let message = "dropped: a header and nothing behind it";
                self.drop_datagram(Dropped::NoPayload, path, None, &message);
                return;
            }
            Ok(Datagram::Headed { client, payload }) => match self.headed(path, &client, mode) {
                Some(id) => (id, payload),
                None => return,
            },
            Ok(Datagram::Bare) => match self.bare(path) {
                Some(id) => (id, 0),
                None => {
                    let foreign = datagram::foreign_header(
                        self.scratch.inbound.bytes(Part::new(slot, from, length)),
                    );
                    return self.nobodys(path, foreign);
                }
            },
            Err(error) => {
                let beginning = bytes[..bytes.len().min(SHOWN)].to_vec();
                self.unfit(path, error, &beginning);
                return;
            }
        };
        self.touch(id);
        if payload < length {
            let part = Part::new(slot, from + payload, length - payload);
            self.enqueue(id, part, tos);
        }
    }

    /// The flow of a datagram that names its client.
    #[inline]
    pub(super) fn headed(&mut self, path: &Path, client: &Client, mode: UdpHeader) -> Option<Id> {
        if mode != UdpHeader::First {
            let key = Key::of_client(path, client, self.settings.destinations.is_some());
            return match self.find(&key) {
                Some(id) => Some(id),
                None => self.begin(key, path, client),
            };
        }
        let key = Key::of_proxy(path);
        if let Some(id) = self.find(&key) {
            let route = self.flows.get(id)?.flow.route;
            let elsewhere = self.settings.destinations.is_some() && route.asked != asked(client);
            if route.client == client_of(client, path) && !elsewhere {
                return Some(id);
            }
            // what came before the new header is the old client's
            self.send_queue_of(id);
            self.finish(id, Ended::Replaced);
        }
        self.begin(key, path, client)
    }

    /// The flow of a datagram without a header.
    pub(super) fn bare(&mut self, path: &Path) -> Option<Id> {
        let key = Key::of_proxy(path);
        if let Some(id) = self.find(&key) {
            return Some(id);
        }
        let flow = self.common.registry.adopt(self.number, &key)?;
        Some(self.adopt(flow))
    }

    /// The flow with this key, if it is still this worker's.
    #[inline]
    pub(super) fn find(&mut self, key: &Key) -> Option<Id> {
        let id = self.flows.find(key)?;
        if self.flows.get(id)?.flow.owner() == self.number {
            return Some(id);
        }
        self.forget(id);
        None
    }

    pub(super) fn touch(&mut self, id: Id) {
        if self.flows.touch(id, self.now)
            && let Some(held) = self.flows.get(id)
        {
            held.flow.set_used(self.now);
        }
    }

    pub(super) fn enqueue(&mut self, id: Id, part: Part, tos: u8) {
        let Some(held) = self.flows.get_mut(id) else {
            return;
        };
        // at most one a byte of the arena
        let at = self.scratch.queue.len() as u32;
        self.scratch.queue.push(Queued {
            part,
            tos,
            next: NONE,
        });
        if held.first == NONE {
            held.first = at;
            self.scratch.touched.push(id);
        } else {
            self.scratch.queue[held.last as usize].next = at;
        }
        held.last = at;
    }

    /// Sends what is queued, flow by flow.
    pub(super) fn send_queued(&mut self) {
        self.served += self.scratch.touched.len();
        self.note_company();
        for at in 0..self.scratch.touched.len() {
            self.send_queue_of(self.scratch.touched[at]);
        }
        self.scratch.touched.clear();
        self.scratch.queue.clear();
    }

    pub(super) fn send_queue_of(&mut self, id: Id) {
        // nothing where the flow was ended for another one's sake meanwhile: that counted its queue
        let Some(held) = self.flows.get_mut(id).filter(|held| held.first != NONE) else {
            return;
        };
        if held.socket.is_none() && !self.open_socket(id) {
            self.unqueue(id, Dropped::NoSocket);
            return;
        }
        let Some(held) = self.flows.get_mut(id) else {
            return;
        };
        let first = std::mem::replace(&mut held.first, NONE);
        let Some(socket) = &held.socket else { return };
        held.flow.asks();
        let only = self.scratch.queue[first as usize];
        let sent = if only.next == NONE && only.tos == 0 {
            send_one(socket, self.scratch.inbound.bytes(only.part))
        } else {
            let to = Receiver::Connected(held.flow.route.target.family());
            let mut at = first;
            while at != NONE {
                let queued = self.scratch.queue[at as usize];
                let envelope = Envelope {
                    to,
                    from: None,
                    tos: queued.tos,
                };
                self.scratch
                    .to_target
                    .push(envelope, queued.part, self.to_target);
                at = queued.next;
            }
            self.scratch
                .to_target
                .send(socket.as_fd(), &self.scratch.inbound, &mut self.to_target)
        };
        self.counters.datagrams_to_target.add(sent.datagrams);
        self.counters.bytes_to_target.add(sent.bytes);
        held.flow.sent(sent.bytes);
        if let Some(error) = &sent.error {
            let down = error.kind() == io::ErrorKind::ConnectionRefused;
            self.not_sent(&sent, Some(id));
            if down {
                self.service_down(id);
            }
        }
    }

    /// Drops what is queued at a flow.
    pub(super) fn unqueue(&mut self, id: Id, why: Dropped) {
        let Some(held) = self.flows.get_mut(id) else {
            return;
        };
        let mut at = std::mem::replace(&mut held.first, NONE);
        while let Some(queued) = self.scratch.queue.get(at as usize) {
            self.counters.lose(why, 1);
            at = queued.next;
        }
    }
}

/// The usual datagram, without the cost of a message header.
fn send_one(socket: &UdpSocket, bytes: &[u8]) -> Sent {
    let mut earlier = true;
    loop {
        return match socket.send(bytes) {
            Ok(_) => Sent {
                datagrams: 1,
                bytes: bytes.len() as u64,
                ..Sent::default()
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if std::mem::take(&mut earlier) && is_too_big(&error) => continue,
            Err(error) => Sent {
                failed: 1,
                error: Some(error),
                ..Sent::default()
            },
        };
    }
}
