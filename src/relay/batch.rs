//! Many datagrams per system call: `recvmmsg(2)` and `sendmmsg(2)` with the control messages a UDP relay
//! needs, and runs of equal datagrams as one (`UDP_GRO`, `UDP_SEGMENT`).
//!
//! Owns: receive buffers, message headers, control messages in both directions, and the fallback where the
//! kernel refuses to segment. Must not know: headers of any protocol, flows, who may send what.
//!
//! An [`Arena`] receives into slots that never move; an [`Outbox`] sends parts *of those slots*, named by
//! position, so that payloads are neither copied nor borrowed across calls. Nothing allocates once both
//! have seen their largest batch.
//!
//! Own code because nix's `recvmmsg` takes the segment size of a message without one from the message
//! before it, and its `sendmmsg` has one set of control messages for all messages.

use std::net::IpAddr;

pub(super) use self::arena::{Arena, Part};
pub(super) use self::outbox::{Envelope, Outbox, Receiver, SegmentLimit, Sent, is_too_big};

mod arena;
mod outbox;
#[cfg(test)]
mod tests;

/// Room for all control messages of one datagram, aligned as `cmsghdr` wants it.
type ControlSpace = [u64; 16];

/// Where a datagram was sent to, which is where its answer has to come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Local {
    /// The address, never multicast.
    pub(super) addr: IpAddr,
    /// The interface where the address alone does not tell (link-local), else 0: the routing's choice.
    pub(super) interface: u32,
}
