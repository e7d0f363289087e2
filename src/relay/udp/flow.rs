//! A flow: what tells it from others, and what both its worker and the other workers see of it.
//!
//! Owns: the identity of flows per kind of sender. Must not know: tables, epoll.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::datagram::Client;
use crate::model::{ClientAddr, ProxyAddr, TargetAddr};
use crate::relay::batch::{Envelope, Local, Receiver};
use crate::relay::spp::Spp;

/// An address and port in the form that hashes and compares fastest; IPv4 as `::ffff:a.b.c.d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Packed {
    addr: u128,
    /// The port, above it the scope id of a link-local address, above that a bit that tells any address,
    /// also `[::]:0`, from none.
    rest: u64,
}

impl Packed {
    #[inline]
    fn new(addr: SocketAddr) -> Self {
        let scope = match addr {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(addr) => addr.scope_id(),
        };
        Self {
            addr: packed(addr.ip()),
            rest: 1 << 63 | u64::from(scope) << 16 | u64::from(addr.port()),
        }
    }
}

impl Packed {
    /// With the port of our own beside it. For an address without a scope, whose place it takes.
    #[inline]
    fn at(self, port: u16) -> Self {
        Self {
            rest: self.rest | u64::from(port) << 16,
            ..self
        }
    }
}

#[inline]
fn packed(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().to_bits(),
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

/// What tells a flow from others.
///
/// The proxy's address and port and the address and port it sent to, always: these are the two ends of the answer.
/// With a header on every datagram its client, too; with Simple Proxy Protocol also the address that the
/// client sent to, because the answer has to name it. With a header on the first datagram only, the client
/// is no part of the identity but a property that the next header replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    proxy: Packed,
    client: Packed,
    via: Packed,
    /// 0 where the listener is bound to one address.
    local: u128,
}

impl Key {
    /// The flow of a proxy's address and port, whoever its client is.
    #[inline]
    pub(super) fn of_proxy(path: &Path) -> Self {
        Self {
            proxy: Packed::new(path.peer),
            client: Packed::default(),
            via: Packed::default().at(path.port),
            local: path.local.map_or(0, |local| packed(local.addr)),
        }
    }

    /// The flow of a client behind a proxy's address and port; by where it sent to as well, where that is the
    /// target.
    #[inline]
    pub(super) fn of_client(path: &Path, client: &Client, by_destination: bool) -> Self {
        let key = Self::of_proxy(path);
        match client {
            Client::Proxy => key,
            Client::Named { client, asked } => Self {
                client: Packed::new(client.get()),
                via: match by_destination {
                    true => Packed::new(*asked).at(path.port),
                    false => key.via,
                },
                ..key
            },
            Client::Spp(header) => Self {
                client: Packed::new(header.client().get()),
                via: Packed::new(header.proxy()).at(path.port),
                ..key
            },
        }
    }
}

/// The way a datagram came, which is the way its answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Path {
    /// The proxy, as the listener's socket names it.
    pub(super) peer: SocketAddr,
    /// Where it sent to; `None` where the listener is bound to one address.
    pub(super) local: Option<Local>,
    /// The listener's port.
    pub(super) port: u16,
}

impl Path {
    /// The proxy, IPv4-mapped addresses as IPv4.
    pub(super) fn proxy(&self) -> ProxyAddr {
        ProxyAddr::new(self.peer)
    }

    /// How an answer is sent.
    pub(super) fn answer(&self, tos: u8) -> Envelope {
        Envelope {
            to: Receiver::Address(self.peer),
            from: self.local,
            tos,
        }
    }
}

/// Whose a flow is and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) key: Key,
    pub(super) path: Path,
    pub(super) client: ClientAddr,
    pub(super) target: TargetAddr,
    /// Where the client sent its datagram to, if the proxy says so.
    pub(super) asked: Option<SocketAddr>,
    /// The header that every answer carries.
    pub(super) spp: Option<Spp>,
}

impl Route {
    /// Whether a flow of this route goes on where another datagram with the same key asks for that route. It
    /// keeps its target where only the configuration has another one now.
    pub(super) fn is_of_the_same(&self, asked: &Self) -> bool {
        self.client == asked.client && (self.target == asked.target || self.asked == asked.asked)
    }
}

/// No worker: the flow is over.
pub(super) const NOBODY: u32 = u32::MAX;

/// A flow, as all workers see it. Datagrams touch only atomics, which its owner writes, and whoever reads its
/// answers for him.
#[derive(Debug)]
pub(super) struct Flow {
    /// Tells it from all other connections and flows of the process.
    pub(super) id: u64,
    pub(super) route: Route,
    /// When it began, in milliseconds since the relay's start.
    pub(super) since: u64,
    /// The worker it belongs to. Changed under the registry's lock only; another worker may take it over.
    owner: AtomicU32,
    /// When it was last used, in milliseconds since the relay's start, as exact as the table has it.
    used: AtomicU64,
    /// Payload bytes handed to the service.
    to_target: AtomicU64,
    /// Bytes of the service's answers.
    to_client: AtomicU64,
    /// Something was sent to the service since it last answered.
    asked: AtomicBool,
    /// The service has answered at least once.
    answered: AtomicBool,
    /// The spoofed, connected socket, once there was something to send.
    socket: Mutex<Option<Arc<UdpSocket>>>,
}

impl Flow {
    pub(super) fn new(
        id: u64,
        route: Route,
        owner: u32,
        used: u64,
        socket: Option<Arc<UdpSocket>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            route,
            since: used,
            to_target: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            owner: AtomicU32::new(owner),
            used: AtomicU64::new(used),
            asked: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            socket: Mutex::new(socket),
        })
    }

    pub(super) fn owner(&self) -> u32 {
        self.owner.load(Ordering::Acquire)
    }

    pub(super) fn set_owner(&self, worker: u32) {
        self.owner.store(worker, Ordering::Release);
    }

    /// Bytes handed to the service and answered by it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (
            self.to_target.load(Ordering::Relaxed),
            self.to_client.load(Ordering::Relaxed),
        )
    }

    /// Adds bytes handed to the service; for the owner only, so that a plain load and store do.
    pub(super) fn sent(&self, bytes: u64) {
        let sum = self.to_target.load(Ordering::Relaxed) + bytes;
        self.to_target.store(sum, Ordering::Relaxed);
    }

    /// Whether something was sent to the service since it last answered.
    pub(super) fn awaits_answer(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether the service has answered at least once.
    pub(super) fn was_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Notes that something is sent to the service.
    pub(super) fn asks(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Notes that the service has answered.
    pub(super) fn hears(&self) {
        self.asked.store(false, Ordering::Relaxed);
        self.answered.store(true, Ordering::Relaxed);
    }

    /// Adds bytes that the service answered; for whoever reads its answers only.
    pub(super) fn answered(&self, bytes: u64) {
        let sum = self.to_client.load(Ordering::Relaxed) + bytes;
        self.to_client.store(sum, Ordering::Relaxed);
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn set_used(&self, now: u64) {
        self.used.store(now, Ordering::Relaxed);
    }

    pub(super) fn socket(&self) -> Option<Arc<UdpSocket>> {
        self.lock().clone()
    }

    pub(super) fn set_socket(&self, socket: Option<Arc<UdpSocket>>) {
        *self.lock() = socket;
    }

    pub(super) fn take_socket(&self) -> Option<Arc<UdpSocket>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<UdpSocket>>> {
        // the value is whole whatever happened to the thread that held it
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(peer: &str, local: Option<&str>) -> Path {
        Path {
            peer: peer.parse().unwrap(),
            local: local.map(|addr| Local {
                addr: addr.parse().unwrap(),
                interface: 0,
            }),
            port: 53,
        }
    }

    fn named(client: &str) -> Client {
        Client::Named {
            client: ClientAddr::new(client.parse().unwrap()),
            asked: "198.51.100.1:53".parse().unwrap(),
        }
    }

    #[test]
    fn what_tells_flows_apart() {
        let spp = |client: &str, via: &str| {
            Client::Spp(Spp::new(client.parse().unwrap(), via.parse().unwrap()))
        };
        let here = path("10.0.0.1:1", None);
        let keys = [
            Key::of_proxy(&here),
            // what no client can be must not be taken for the proxy itself
            Key::of_client(&here, &named("[::]:0"), false),
            Key::of_client(&here, &named("192.0.2.1:5"), false),
            Key::of_proxy(&Path { port: 54, ..here }),
            Key::of_client(&Path { port: 54, ..here }, &named("192.0.2.1:5"), false),
            Key::of_client(
                &Path { port: 54, ..here },
                &spp("192.0.2.1:5", "203.0.113.1:53"),
                false,
            ),
            Key::of_client(&here, &named("192.0.2.1:6"), false),
            Key::of_client(&path("10.0.0.1:2", None), &named("192.0.2.1:5"), false),
            Key::of_client(&path("10.0.0.2:1", None), &named("192.0.2.1:5"), false),
            Key::of_client(
                &path("10.0.0.1:1", Some("10.9.9.1")),
                &named("192.0.2.1:5"),
                false,
            ),
            Key::of_client(&path("[fe80::1%2]:1", None), &named("192.0.2.1:5"), false),
            Key::of_client(&path("[fe80::1%3]:1", None), &named("192.0.2.1:5"), false),
            Key::of_client(&here, &spp("192.0.2.1:5", "203.0.113.1:53"), false),
            Key::of_client(&here, &spp("192.0.2.1:5", "203.0.113.2:53"), false),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert_eq!(keys.iter().position(|other| other == key), Some(at));
        }
    }

    #[test]
    fn a_mapped_peer_is_the_same_proxy() {
        assert_eq!(
            Key::of_proxy(&path("[::ffff:10.0.0.1]:1", None)),
            Key::of_proxy(&path("10.0.0.1:1", None))
        );
    }
}
