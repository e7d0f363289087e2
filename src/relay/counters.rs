//! What a relay counts: one set per worker thread, written by that thread only, summed on reading.
//!
//! Owns: the counters and the names of their kinds. Must not know: connections, log lines.

use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::{Deserializer, Error as _};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use super::histogram::{Distribution, Histogram};

/// An enum whose values are counted one by one, with the name of each in reports.
macro_rules! kinds {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every kind, in the order of the counters.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$variant),+];

            /// The name in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    };
}
pub(super) use kinds;

kinds! {
    /// Why a connection was closed without a word to the service.
    Refusal {
        /// The peer is not on the allow list.
        ProxyNotAllowed = "proxy-not-allowed",
        /// The first bytes begin no PROXY header.
        NoHeader = "no-header",
        /// A PROXY header with a mistake in it.
        BadHeader = "bad-header",
        /// The connection ended inside the header.
        HeaderTruncated = "header-truncated",
        /// No complete header within the header timeout.
        HeaderTimeout = "header-timeout",
        /// Too many connections wait for their header.
        TooManyWaiting = "too-many-waiting",
        /// `max-connections` are open.
        TooManyConnections = "too-many-connections",
        /// The client's address is 0.0.0.0/8 or ::.
        ClientUnspecified = "client-unspecified",
        /// The client's address is 127.0.0.0/8 or ::1.
        ClientLoopback = "client-loopback",
        /// The client's address is a multicast address.
        ClientMulticast = "client-multicast",
        /// The client's address is a broadcast address.
        ClientBroadcast = "client-broadcast",
        /// The client's address is fe80::/10, which means nothing without its interface.
        ClientLinkLocal = "client-link-local",
        /// The instance has no target of the client's family.
        FamilyNotServed = "family-not-served",
        /// Rules that are not this program's handed it over from a port that no target port belongs to.
        PortNotServed = "port-not-served",
        /// The destination in the header is in none of `destinations=`.
        DestinationRefused = "destination-refused",
    }
}

kinds! {
    /// Why the service was not reached.
    ConnectFailure {
        /// Nothing listens at the target.
        ServiceDown = "service-down",
        /// No answer within the connect timeout.
        TimedOut = "timed-out",
        /// The kernel found no way from the client's address to the target or back.
        NoRoute = "no-route",
        /// The kernel took another source address than the client's.
        SourceReplaced = "source-replaced",
        /// No free port for the client's address.
        NoPort = "no-port",
        /// The process or the system ran out of descriptors or memory.
        NoDescriptors = "no-descriptors",
        /// CAP_NET_ADMIN is missing, or a firewall rejects.
        NotPermitted = "not-permitted",
        /// Anything else.
        Other = "other",
    }
}

/// A counter with one writer: its worker thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; for the owning thread only. A plain load and store: no locked instruction.
    #[inline]
    pub(super) fn add(&self, amount: u64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add(amount);
        self.0.store(value, Ordering::Relaxed);
    }

    /// Takes one away from a gauge; for the owning thread only.
    #[inline]
    pub(super) fn sub_one(&self) {
        self.add(u64::MAX);
    }

    /// The value, from any thread.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one worker thread. Aligned so that two workers' never share a cache line pair.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections open now, in whatever state.
    pub active: Counter,
    /// Of these, without a complete header yet.
    pub waiting: Counter,
    /// Connections that reached the service.
    pub relayed: Counter,
    /// Connections closed by the proxy without a byte: health checks.
    pub empty: Counter,
    /// Payload bytes handed to the service.
    pub bytes_to_target: Counter,
    /// Bytes handed to the client.
    pub bytes_to_client: Counter,
    /// Of all bytes, those that never entered user space.
    pub bytes_spliced: Counter,
    /// Connections whose client port was taken and given up, the address kept.
    pub ports_given_up: Counter,
    /// Relayed connections that ended with a reset or another error on either side.
    pub resets: Counter,
    /// Relayed connections ended by the idle timeout.
    pub idle_ended: Counter,
    /// Connections ended by `conns kill`.
    pub killed: Counter,
    /// How long complete headers took from accept on.
    pub header_wait: Histogram,
    /// How long services took to answer.
    pub connect_time: Histogram,
    /// Times that accepting paused because descriptors ran out.
    pub accept_pauses: Counter,
    refused: [Counter; Refusal::ALL.len()],
    connect_failed: [Counter; ConnectFailure::ALL.len()],
}

impl Counters {
    pub(super) fn refuse(&self, kind: Refusal) {
        self.refused[kind as usize].add(1);
    }

    pub(super) fn connect_failed(&self, kind: ConnectFailure) {
        self.connect_failed[kind as usize].add(1);
    }

    /// What has been counted so far.
    pub fn read(&self) -> Totals {
        Totals {
            accepted: self.accepted.get(),
            active: self.active.get(),
            waiting: self.waiting.get(),
            relayed: self.relayed.get(),
            empty: self.empty.get(),
            bytes_to_target: self.bytes_to_target.get(),
            bytes_to_client: self.bytes_to_client.get(),
            bytes_spliced: self.bytes_spliced.get(),
            ports_given_up: self.ports_given_up.get(),
            resets: self.resets.get(),
            idle_ended: self.idle_ended.get(),
            killed: self.killed.get(),
            header_wait: self.header_wait.read(),
            connect_time: self.connect_time.read(),
            accept_pauses: self.accept_pauses.get(),
            refused: Refused::from_counters(&self.refused),
            connect_failed: ConnectFailed::from_counters(&self.connect_failed),
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
    pub accepted: u64,
    pub active: u64,
    pub waiting: u64,
    pub relayed: u64,
    pub empty: u64,
    pub bytes_to_target: u64,
    pub bytes_to_client: u64,
    pub bytes_spliced: u64,
    pub ports_given_up: u64,
    pub resets: u64,
    pub idle_ended: u64,
    pub killed: u64,
    pub header_wait: Distribution,
    pub connect_time: Distribution,
    pub accept_pauses: u64,
    pub refused: Refused,
    pub connect_failed: ConnectFailed,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.active += other.active;
        self.waiting += other.waiting;
        self.relayed += other.relayed;
        self.empty += other.empty;
        self.bytes_to_target += other.bytes_to_target;
        self.bytes_to_client += other.bytes_to_client;
        self.bytes_spliced += other.bytes_spliced;
        self.ports_given_up += other.ports_given_up;
        self.resets += other.resets;
        self.idle_ended += other.idle_ended;
        self.killed += other.killed;
        self.header_wait += other.header_wait;
        self.connect_time += other.connect_time;
        self.accept_pauses += other.accept_pauses;
        self.refused += other.refused;
        self.connect_failed += other.connect_failed;
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

/// Counts by [`Refusal`]; serialised as a map from name to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Refused([u64; Refusal::ALL.len()]);

impl AddAssign for Refused {
    fn add_assign(&mut self, other: Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }
}

impl Refused {
    pub(super) fn from_counters(counters: &[Counter; Refusal::ALL.len()]) -> Self {
        Self(std::array::from_fn(|at| counters[at].get()))
    }

    /// How many of this kind.
    pub fn of(&self, kind: Refusal) -> u64 {
        self.0[kind as usize]
    }

    /// How many in all.
    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Serialize for Refused {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        as_map(to, Refusal::ALL.map(Refusal::name), self.0)
    }
}

/// Counts by [`ConnectFailure`]; serialised as a map from name to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConnectFailed([u64; ConnectFailure::ALL.len()]);

impl AddAssign for ConnectFailed {
    fn add_assign(&mut self, other: Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }
}

impl ConnectFailed {
    pub(super) fn from_counters(counters: &[Counter; ConnectFailure::ALL.len()]) -> Self {
        Self(std::array::from_fn(|at| counters[at].get()))
    }

    /// How many of this kind.
    pub fn of(&self, kind: ConnectFailure) -> u64 {
        self.0[kind as usize]
    }

    /// How many in all.
    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Serialize for ConnectFailed {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        as_map(to, ConnectFailure::ALL.map(ConnectFailure::name), self.0)
    }
}

impl<'de> Deserialize<'de> for Refused {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(from_map(from, Refusal::ALL.map(Refusal::name))?))
    }
}

impl<'de> Deserialize<'de> for ConnectFailed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let names = ConnectFailure::ALL.map(ConnectFailure::name);
        Ok(Self(from_map(from, names)?))
    }
}

/// The reverse of [`as_map`]; what another version counts and this one does not know is an error.
pub(super) fn from_map<'de, D: Deserializer<'de>, const N: usize>(
    from: D,
    names: [&'static str; N],
) -> Result<[u64; N], D::Error> {
    let mut counts = [0; N];
    for (name, count) in BTreeMap::<String, u64>::deserialize(from)? {
        let at = names.iter().position(|known| *known == name);
        counts[at.ok_or_else(|| D::Error::custom(format!("unknown kind '{name}'")))?] = count;
    }
    Ok(counts)
}

pub(super) fn as_map<S: Serializer, const N: usize>(
    to: S,
    names: [&'static str; N],
    counts: [u64; N],
) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(Some(N))?;
    for (name, count) in names.into_iter().zip(counts) {
        map.serialize_entry(name, &count)?;
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_summed() {
        let (one, two) = (Counters::default(), Counters::default());
        one.active.add(1);
        one.active.sub_one();
        one.refuse(Refusal::NoHeader);
        two.refuse(Refusal::NoHeader);
        two.refuse(Refusal::FamilyNotServed);
        two.connect_failed(ConnectFailure::TimedOut);
        let totals: Totals = [&one, &two].into_iter().map(Counters::read).sum();
        assert_eq!(totals.active, 0);
        assert_eq!(totals.refused.of(Refusal::NoHeader), 2);
        assert_eq!(totals.refused.all(), 3);
        assert_eq!(totals.connect_failed.of(ConnectFailure::TimedOut), 1);
        let json = serde_json::to_value(totals).unwrap();
        assert_eq!(json["refused"]["no-header"], 2);
        assert_eq!(json["connect_failed"]["timed-out"], 1);
        assert_eq!(serde_json::from_value::<Totals>(json).unwrap(), totals);
    }
}
