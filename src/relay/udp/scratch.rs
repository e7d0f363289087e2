//! What a round of a relay works with and leaves empty: one for all UDP relays of a thread.
//!
//! Owns: the batch in each direction, and datagrams queued at their flows. Must not know: whose they are.

use super::table::Id;
use crate::relay::batch::{Arena, Outbox, Part};

/// Datagrams (or runs of equal ones) per call.
const BATCH: usize = 128;

/// No queued datagram.
pub(super) const NONE: u32 = u32::MAX;

/// A datagram queued at its flow.
#[derive(Clone, Copy)]
pub(super) struct Queued {
    pub(super) part: Part,
    pub(super) tos: u8,
    /// The next of the same flow, or [`NONE`].
    pub(super) next: u32,
}

/// The batches of a thread.
pub(in crate::relay) struct Scratch {
    /// Read from listeners.
    pub(super) inbound: Arena,
    pub(super) queue: Vec<Queued>,
    /// Flows with something queued.
    pub(super) touched: Vec<Id>,
    pub(super) to_target: Outbox,
    /// Read from flows' sockets.
    pub(super) outbound: Arena,
    /// How many of its slots hold answers that are not sent yet.
    pub(super) gathered: usize,
    pub(super) to_client: Outbox,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::none()
    }
}

impl Scratch {
    /// One without room, for whoever has lent his own: costs nothing.
    pub(super) fn none() -> Self {
        Self {
            inbound: Arena::new(0, true),
            queue: Vec::new(),
            touched: Vec::new(),
            to_target: Outbox::new(),
            outbound: Arena::new(0, false),
            gathered: 0,
            to_client: Outbox::new(),
        }
    }

    /// Makes room, the first time on this thread.
    pub(super) fn prepare(&mut self) {
        if self.inbound.slots() == 0 {
            self.inbound = Arena::new(BATCH, true);
            self.outbound = Arena::new(BATCH, false);
        }
    }
}
