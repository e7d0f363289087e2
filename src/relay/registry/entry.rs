//! One connection as it is remembered, while it is open and afterwards.
//!
//! Owns: what is known about it, in few bytes. Must not know: the other connections.

use std::cell::{Cell, OnceCell};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::model::{ClientAddr, Mark, ProxyAddr, TargetAddr};
use crate::relay::header::{Endpoints, Header, Tlvs, Version};
use crate::relay::settings::Settings;
use crate::relay::view::{Connection, HeaderKind, Reason, Stage};

/// What is kept of an authority; the DNS has no longer names.
const MAX_AUTHORITY: usize = 255;

/// The kernel's coarse monotonic clock in steps of 10 ms, which wraps after 497 days: a few nanoseconds to
/// read, hardly coarser than its tick (1 to 10 ms), and enough for ages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::relay) struct Moment(pub(super) u32);

impl Moment {
    /// Milliseconds.
    const STEP: u128 = 10;

    pub(in crate::relay) fn now() -> Self {
        // the clock is there since Linux 2.6.32; without it every age is 0
        Self(
            clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |now| {
                let now = Duration::from(now);
                (now.as_millis() / Self::STEP) as u32
            }),
        )
    }

    /// Milliseconds from an earlier moment to this one.
    pub(in crate::relay) fn since(self, earlier: Self) -> u64 {
        u64::from(self.0.wrapping_sub(earlier.0)) * Self::STEP as u64
    }
}

/// An address and a port in 18 bytes: IPv4 is mapped, which [`ProxyAddr`] and [`ClientAddr`] never are.
#[derive(Debug, Clone, Copy)]
struct Packed {
    ip: [u8; 16],
    port: u16,
}

impl Packed {
    const NONE: Self = Self {
        ip: [0; 16],
        port: 0,
    };

    fn new(addr: SocketAddr) -> Self {
        let ip = match addr.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self {
            ip: ip.octets(),
            port: addr.port(),
        }
    }

    fn get(self) -> SocketAddr {
        SocketAddr::new(IpAddr::from(self.ip).to_canonical(), self.port)
    }

    /// A process of this host is its pid in `::/96` at port 0, where no TCP peer ever is.
    fn of_proxy(proxy: ProxyAddr) -> Self {
        match proxy {
            ProxyAddr::Inet(addr) => Self::new(addr),
            ProxyAddr::Local(pid) => Self {
                ip: u128::from(pid).to_be_bytes(),
                port: 0,
            },
        }
    }

    fn proxy(self) -> ProxyAddr {
        match u32::try_from(u128::from_be_bytes(self.ip)) {
            Ok(pid) if self.port == 0 => ProxyAddr::Local(pid),
            _ => ProxyAddr::new(self.get()),
        }
    }
}

/// What is known about one connection. Small on purpose: with its counts, an `Rc` of it fits the
/// allocator's size class of 112 bytes.
#[derive(Debug)]
pub(in crate::relay) struct Entry {
    /// As they were when it was accepted: its target and mark stay.
    pub(super) settings: Arc<Settings>,
    proxy: Packed,
    /// Means nothing before [`Stage::Connecting`].
    client: Cell<Packed>,
    bytes: Cell<(u64, u64)>,
    pub(super) accepted: Moment,
    pub(super) moved: Cell<Moment>,
    sent: OnceCell<Box<Sent>>,
    /// At which it was accepted; 0 on a Unix socket.
    port: u16,
    /// Where it stands in the registry's list.
    pub(super) slot: Cell<u32>,
    /// The port of the socket towards the service; 0 as long as there is none.
    local_port: Cell<u16>,
    stage: Cell<Stage>,
    version: Cell<Option<Version>>,
    pub(super) reason: Cell<Option<Reason>>,
    pub(super) killed: Cell<bool>,
}

/// What some proxies send along.
#[derive(Debug)]
struct Sent {
    unique_id: Option<Box<[u8]>>,
    authority: Option<Box<str>>,
    /// The destination, where it is the target.
    asked: Option<TargetAddr>,
}

impl Entry {
    /// A connection that was just accepted; `slot` is its place in the registry's list.
    pub(super) fn new(proxy: ProxyAddr, port: u16, settings: Arc<Settings>, slot: u32) -> Self {
        let now = Moment::now();
        Self {
            settings,
            proxy: Packed::of_proxy(proxy),
            port,
            client: Cell::new(Packed::NONE),
            bytes: Cell::new((0, 0)),
            accepted: now,
            moved: Cell::new(now),
            sent: OnceCell::new(),
            slot: Cell::new(slot),
            local_port: Cell::new(0),
            stage: Cell::new(Stage::Header),
            version: Cell::new(None),
            reason: Cell::new(None),
            killed: Cell::new(false),
        }
    }

    /// Where it goes, once the client is known.
    pub(in crate::relay) fn target(&self) -> Option<TargetAddr> {
        if self.settings.destinations.is_some() {
            return self.sent.get()?.asked;
        }
        self.settings.target_at(self.client()?.family(), self.port)
    }

    pub(in crate::relay) fn proxy(&self) -> ProxyAddr {
        self.proxy.proxy()
    }

    /// The port at which it was accepted; 0 on a Unix socket.
    pub(in crate::relay) fn port(&self) -> u16 {
        self.port
    }

    /// The client, where the header named one already.
    pub(in crate::relay) fn client(&self) -> Option<ClientAddr> {
        (self.stage.get() != Stage::Header).then(|| ClientAddr::new(self.client.get().get()))
    }

    /// The header is complete.
    pub(in crate::relay) fn has_header(&self, header: &Header<'_>, client: ClientAddr) {
        self.client.set(Packed::new(client.get()));
        self.version.set(Some(header.version));
        self.stage.set(Stage::Connecting);
        let asked = match header.endpoints {
            Endpoints::Proxied { destination, .. } if self.settings.destinations.is_some() => {
                Some(TargetAddr::new(destination))
            }
            _ => None,
        };
        if let Some(sent) = sent(header.tlvs, asked) {
            // a connection has one header: the cell is empty
            let _ = self.sent.set(Box::new(sent));
        }
    }

    /// There is a socket towards the service.
    pub(in crate::relay) fn is_connecting(&self, local_port: u16) {
        self.local_port.set(local_port);
    }

    /// The service answered; bytes of the first segment are with it already.
    pub(in crate::relay) fn is_relaying(&self) {
        self.stage.set(Stage::Relaying);
        self.moved.set(Moment::now());
    }

    /// Bytes handed to the service and to the client.
    pub(in crate::relay) fn bytes(&self) -> (u64, u64) {
        self.bytes.get()
    }

    /// Notes the bytes moved so far to the service and to the client. Reads the clock only on a change.
    #[inline]
    pub(in crate::relay) fn moved(&self, bytes: (u64, u64)) {
        if bytes != self.bytes.get() {
            self.bytes.set(bytes);
            self.moved.set(Moment::now());
        }
    }

    /// Milliseconds since it was accepted.
    pub(in crate::relay) fn age(&self) -> u64 {
        Moment::now().since(self.accepted)
    }

    /// Why it ended, or will.
    pub(in crate::relay) fn reason(&self) -> Option<Reason> {
        self.reason.get()
    }

    /// Remembers why it ends; the first reason is the true one.
    pub(in crate::relay) fn ends(&self, reason: Reason) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
        }
    }

    /// Whether somebody wants this connection to end.
    #[inline]
    pub(in crate::relay) fn is_killed(&self) -> bool {
        self.killed.get()
    }

    pub(super) fn row(&self, id: u64, now: Moment) -> Connection {
        let settings = &self.settings;
        let client = self.client();
        let (bytes_to_target, bytes_to_client) = self.bytes.get();
        let local = client
            .filter(|_| self.local_port.get() != 0)
            .map(|client| SocketAddr::new(client.ip(), self.local_port.get()));
        let sent = self.sent.get();
        Connection {
            id,
            instance: settings.name.to_string(),
            mark: settings.mark.map_or(0, Mark::get),
            stage: self.stage.get(),
            client: client.map(ClientAddr::get),
            proxy: self.proxy(),
            port: (self.port != 0).then_some(self.port),
            local,
            target: self.target().map(TargetAddr::get),
            age_ms: now.since(self.accepted),
            idle_ms: now.since(self.moved.get()),
            bytes_to_target,
            bytes_to_client,
            header: self.version.get().map(|version| match version {
                Version::V1 => HeaderKind::Proxy(1),
                Version::V2 => HeaderKind::Proxy(2),
            }),
            unique_id: sent.and_then(|sent| Some(printable(sent.unique_id.as_deref()?))),
            authority: sent.and_then(|sent| Some(sent.authority.as_deref()?.to_owned())),
            ended: None,
        }
    }
}

fn sent(tlvs: Tlvs<'_>, asked: Option<TargetAddr>) -> Option<Sent> {
    let unique_id = tlvs.unique_id().map(Box::from);
    let authority = tlvs.authority().map(|name| {
        let end = name.floor_char_boundary(MAX_AUTHORITY);
        Box::from(&name[..end])
    });
    (unique_id.is_some() || authority.is_some() || asked.is_some()).then_some(Sent {
        unique_id,
        authority,
        asked,
    })
}

/// An opaque identifier for people: HAProxy's are text, others' are binary.
fn printable(id: &[u8]) -> String {
    if !id.is_empty() && id.iter().all(u8::is_ascii_graphic) {
        return String::from_utf8_lossy(id).into_owned();
    }
    id.iter().fold("0x".to_owned(), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_small() {
        // with the two counts of the Rc
        assert!(size_of::<Entry>() + 16 <= 112, "{}", size_of::<Entry>());
    }

    #[test]
    fn packed_addresses_come_out_as_they_were() {
        for text in [
            "192.0.2.7:0",
            "0.0.0.0:1",
            "[::]:65535",
            "[2001:db8::7]:40000",
        ] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(Packed::new(addr).get(), addr);
        }
    }

    #[test]
    fn packed_proxies_come_out_as_they_were() {
        for text in [
            "192.0.2.7:1",
            "[::1]:1",
            "[2001:db8::7]:40000",
            "unix:0",
            "unix:4711",
        ] {
            let proxy: ProxyAddr = text.parse().unwrap();
            assert_eq!(Packed::of_proxy(proxy).proxy(), proxy);
        }
    }

    #[test]
    fn ages_survive_the_wrap() {
        assert_eq!(Moment(5).since(Moment(u32::MAX - 4)), 100);
    }
}
