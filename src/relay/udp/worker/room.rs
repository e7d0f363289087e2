//! Which flow ends for another one's descriptor.
//!
//! Owns: how many descriptors flows leave to the rest of the process. Must not know: `max-flows`, which is the
//! registry's.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};

use nix::sys::resource::{Resource, getrlimit};

use super::Worker;
use crate::relay::udp::counters::Ended;
use crate::relay::udp::table::Id;

/// How many descriptors flows leave alone, at most a quarter of all: without any, no connection is accepted,
/// and nobody can ask what is going on.
const SPARE: RawFd = 64;

/// How many flows may end for one descriptor: with a header on the first datagram only, some have none.
const TRIES: usize = 64;

impl Worker {
    /// A flow's new socket, for which another one ended if it is one of those that are left to others.
    pub(super) fn leaving_spares(&mut self, id: Id, socket: UdpSocket) -> UdpSocket {
        // the kernel gives the lowest number that is free
        if socket.as_raw_fd() < self.spare_from {
            return socket;
        }
        // it may have been raised meanwhile (prlimit)
        self.spare_from = spare_from();
        if socket.as_raw_fd() < self.spare_from || !self.make_room_for(id) {
            return socket;
        }
        // in the place of the one that ended: from up there it would hide that these are in use
        match socket.try_clone() {
            Ok(lower) if lower.as_raw_fd() < socket.as_raw_fd() => lower,
            _ => socket,
        }
    }

    /// Ends flows until one had a descriptor, for this flow: the oldest of the proxy that has most, so that
    /// whoever floods pays for it. False when there is none.
    pub(super) fn make_room_for(&mut self, id: Id) -> bool {
        for _ in 0..TRIES {
            let candidates = [self.flows.oldest_of_most(), self.flows.oldest()];
            let mut others = candidates.into_iter().flatten().filter(|one| *one != id);
            let Some(other) = others.next() else {
                return false;
            };
            let had_one = self
                .flows
                .get(other)
                .is_some_and(|held| held.socket.is_some());
            self.finish(other, Ended::NoDescriptors);
            if had_one {
                return true;
            }
        }
        false
    }
}

/// The first of the numbers that flows leave alone.
fn spare_from() -> RawFd {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    limit - (limit / 4).min(SPARE)
}
