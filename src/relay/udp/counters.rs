//! What a UDP relay counts: one set per worker thread, written by that thread only, summed on reading.
//!
//! Owns: the counters and the names of their kinds; the kinds that TCP has too are TCP's. Must not know:
//! sockets, log lines.

use std::iter::Sum;
use std::ops::AddAssign;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::relay::counters::{
    self, ConnectFailed, ConnectFailure, Counter, Refusal, Refused, as_map, from_map, kinds,
};

kinds! {
    /// Why a datagram went no further, where [`Refusal`] has no word for it.
    Dropped {
        /// A PROXY header of version 1, which is not defined for UDP.
        Version1 = "v1-header",
        /// No byte in it, not even a header.
        Empty = "empty",
        /// A header and nothing behind it. Not a drop with `udp-header=first`, where it opens the flow.
        NoPayload = "no-payload",
        /// No header, and no flow of this proxy address and port (`udp-header=first`).
        NoFlow = "no-flow",
        /// It did not fit the receive buffer, or the kernel's notes on it did not.
        Truncated = "truncated",
        /// All flows allowed are taken, and none could be ended for this one in time.
        TooManyFlows = "too-many-flows",
        /// Its flow ended in the same moment: to make room, because the service is down or there is no socket.
        FlowEnded = "flow-ended",
        /// No socket for its client; the reason is among the connect failures.
        NoSocket = "no-socket",
        /// ICMP said that nothing listens at the target.
        ServiceDown = "service-down",
        /// Longer than what can be sent on (also for the 38 bytes that an answer gets in front).
        TooLong = "too-long",
        /// The send buffer was full.
        BufferFull = "buffer-full",
        /// The kernel did not send it for another reason.
        NotSent = "not-sent",
    }
}

kinds! {
    /// Why a flow ended.
    Ended {
        /// Silent in both directions for the idle timeout.
        Idle = "idle",
        /// ICMP said that nothing listens at the target. Not with `udp-header=first`, where only the flow's
        /// socket ends; how often ICMP said so is among the connect failures.
        ServiceDown = "service-down",
        /// It was the oldest of all when `max-flows` were there.
        MaxFlows = "max-flows",
        /// It was the oldest of its proxy when `max-flows-per-proxy` were there.
        MaxFlowsPerProxy = "max-flows-per-proxy",
        /// It was the oldest when descriptors ran out.
        NoDescriptors = "no-descriptors",
        /// There was no socket to be had for its client; the reason is among the connect failures or refusals.
        NoSocket = "no-socket",
        /// A header on its proxy address and port named another client (`udp-header=first`).
        Replaced = "replaced",
        /// Somebody asked for it (`conns kill`).
        Killed = "killed",
        /// The relay ends.
        Drained = "drained",
        /// The proxy went on with its client from another port; the socket went there too.
        Moved = "moved",
    }
}

/// The counters of one worker thread. Aligned so that two workers' never share a cache line pair.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// Flows there are now.
    pub flows: Counter,
    /// Flows begun.
    pub flows_opened: Counter,
    /// Of these, those that came from another worker: the kernel now gives their datagrams to this one.
    pub flows_adopted: Counter,
    /// How often another worker was given a flow's answers to read, because the flow kept its own busy.
    pub flows_lent: Counter,
    /// Flows that ended idle without an answer from the service.
    pub flows_unanswered: Counter,
    /// Datagrams handed to the service, and their payload bytes.
    pub datagrams_to_target: Counter,
    /// Payload bytes handed to the service.
    pub bytes_to_target: Counter,
    /// Datagrams handed to proxies.
    pub datagrams_to_client: Counter,
    /// Their bytes, headers included.
    pub bytes_to_client: Counter,
    /// Datagrams that the kernel dropped because the listeners' receive buffers were full.
    pub overflow_from_proxy: Counter,
    /// Datagrams that the kernel dropped because a flow's receive buffer was full.
    pub overflow_from_target: Counter,
    /// Flows whose client port was taken and given up, the address kept.
    pub ports_given_up: Counter,
    refused: [Counter; Refusal::ALL.len()],
    dropped: [Counter; Dropped::ALL.len()],
    open_failed: [Counter; ConnectFailure::ALL.len()],
    ended: [Counter; Ended::ALL.len()],
}

impl Counters {
    pub(super) fn refuse(&self, kind: Refusal) {
        self.refused[kind as usize].add(1);
    }

    pub(super) fn lose(&self, kind: Dropped, datagrams: u64) {
        self.dropped[kind as usize].add(datagrams);
    }

    pub(super) fn open_failed(&self, kind: ConnectFailure) {
        self.open_failed[kind as usize].add(1);
    }

    pub(super) fn end(&self, kind: Ended) {
        self.ended[kind as usize].add(1);
    }

    /// What has been counted so far.
    pub fn read(&self) -> Totals {
        Totals {
            flows: self.flows.get(),
            flows_opened: self.flows_opened.get(),
            flows_adopted: self.flows_adopted.get(),
            flows_lent: self.flows_lent.get(),
            flows_unanswered: self.flows_unanswered.get(),
            datagrams_to_target: self.datagrams_to_target.get(),
            bytes_to_target: self.bytes_to_target.get(),
            datagrams_to_client: self.datagrams_to_client.get(),
            bytes_to_client: self.bytes_to_client.get(),
            overflow_from_proxy: self.overflow_from_proxy.get(),
            overflow_from_target: self.overflow_from_target.get(),
            ports_given_up: self.ports_given_up.get(),
            refused: Refused::from_counters(&self.refused),
            dropped: DroppedBy(std::array::from_fn(|at| self.dropped[at].get())),
            open_failed: ConnectFailed::from_counters(&self.open_failed),
            ended: EndedBy(std::array::from_fn(|at| self.ended[at].get())),
        }
    }
}

/// A reading of counters, of one worker or summed over several. Fields as in [`Counters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "the fields are those of Counters, described there"
)]
pub struct Totals {
    pub flows: u64,
    pub flows_opened: u64,
    pub flows_adopted: u64,
    pub flows_lent: u64,
    pub flows_unanswered: u64,
    pub datagrams_to_target: u64,
    pub bytes_to_target: u64,
    pub datagrams_to_client: u64,
    pub bytes_to_client: u64,
    pub overflow_from_proxy: u64,
    pub overflow_from_target: u64,
    pub ports_given_up: u64,
    pub refused: Refused,
    pub dropped: DroppedBy,
    pub open_failed: ConnectFailed,
    pub ended: EndedBy,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        // a flow that moves between workers leaves one gauge before or after it enters the other
        self.flows = self.flows.wrapping_add(other.flows);
        self.flows_opened += other.flows_opened;
        self.flows_adopted += other.flows_adopted;
        self.flows_lent += other.flows_lent;
        self.flows_unanswered += other.flows_unanswered;
        self.datagrams_to_target += other.datagrams_to_target;
        self.bytes_to_target += other.bytes_to_target;
        self.datagrams_to_client += other.datagrams_to_client;
        self.bytes_to_client += other.bytes_to_client;
        self.overflow_from_proxy += other.overflow_from_proxy;
        self.overflow_from_target += other.overflow_from_target;
        self.ports_given_up += other.ports_given_up;
        self.refused += other.refused;
        self.open_failed += other.open_failed;
        for (sum, more) in self.dropped.0.iter_mut().zip(other.dropped.0) {
            *sum += more;
        }
        for (sum, more) in self.ended.0.iter_mut().zip(other.ended.0) {
            *sum += more;
        }
    }
}

/// What TCP counts too: a flow is a connection, the datagrams that were refused are those refused.
impl From<Totals> for counters::Totals {
    fn from(udp: Totals) -> Self {
        Self {
            accepted: udp.flows_opened,
            active: udp.flows,
            relayed: udp.flows_opened,
            bytes_to_target: udp.bytes_to_target,
            bytes_to_client: udp.bytes_to_client,
            ports_given_up: udp.ports_given_up,
            idle_ended: udp.ended.of(Ended::Idle),
            killed: udp.ended.of(Ended::Killed),
            refused: udp.refused,
            connect_failed: udp.open_failed,
            ..Self::default()
        }
    }
}

impl Sum for Totals {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// Counts by [`Dropped`]; serialised as a map from name to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DroppedBy([u64; Dropped::ALL.len()]);

impl DroppedBy {
    /// How many of this kind.
    pub fn of(&self, kind: Dropped) -> u64 {
        self.0[kind as usize]
    }

    /// How many in all.
    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Serialize for DroppedBy {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        as_map(to, Dropped::ALL.map(Dropped::name), self.0)
    }
}

/// Counts by [`Ended`]; serialised as a map from name to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EndedBy([u64; Ended::ALL.len()]);

impl EndedBy {
    /// How many of this kind.
    pub fn of(&self, kind: Ended) -> u64 {
        self.0[kind as usize]
    }
}

impl Serialize for EndedBy {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        as_map(to, Ended::ALL.map(Ended::name), self.0)
    }
}

impl<'de> Deserialize<'de> for DroppedBy {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(from_map(from, Dropped::ALL.map(Dropped::name))?))
    }
}

impl<'de> Deserialize<'de> for EndedBy {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(from_map(from, Ended::ALL.map(Ended::name))?))
    }
}
