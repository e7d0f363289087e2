//! What the kernel tells by itself: changes of rules, routes, addresses, links and nf_tables.
//!
//! Two sockets that nothing is ever asked on: on a connection for requests, the notification of an own
//! change would come as an answer. Messages are only looked at as far as it takes to know which part of
//! the state must be read again, and by whom it was changed. Must not know: what is wanted.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::{AddressFamily as RouteFamily, RouteNetlinkMessage};
use tokio::io::unix::AsyncFd;

use super::culprit::{Culprits, Who};
use crate::model::Family;
use crate::pathway::netlink;

/// `RTNLGRP_…`: links, addresses, routes and rules of both families.
const ROUTE_GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// `NFNLGRP_NFTABLES`: what nft, and iptables-nft, change. iptables-legacy tells nobody.
const NFTABLES_GROUPS: [u32; 1] = [7];

/// What either socket may hold before messages are lost. A burst of a few thousand fits.
const BUFFER: usize = 4 << 20;
/// The longest batch that the kernel sends is 32 KiB.
const MESSAGE: usize = 64 << 10;
/// After so many batches at a time the reader gets its turn, however many follow.
const AT_A_TIME: usize = 4096;

/// `NFNL_SUBSYS_NFTABLES`, in the upper byte of a message's type.
const NFTABLES: u16 = 10;
/// `NFT_MSG_NEWGEN`: a transaction is complete; it says whose.
const NEW_GENERATION: u16 = 15;
/// `NFT_MSG_DEL…`: table, chain, rule, set, set element.
const DELETIONS: [u16; 5] = [2, 5, 8, 11, 14];
/// `NFTA_…_TABLE` is 1 in every message about tables and what is in them.
const TABLE: u16 = 1;
/// `NFTA_GEN_PROC_PID` and `NFTA_GEN_PROC_NAME`.
const GENERATION_PID: u16 = 2;
const GENERATION_NAME: u16 = 3;
/// The tables that can hold lines of ours.
const TABLES: [&[u8]; 2] = [b"mangle", b"mmproxy"];
/// `RTA_TABLE`.
const ROUTE_TABLE: u16 = 15;
/// `RTM_F_CLONED`: an entry of the route cache.
const CLONED: u32 = 0x200;
/// `lo` has index 1 in every network namespace.
const LO: u32 = 1;

/// The parts of the state that must be read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Parts {
    pub(super) rules: bool,
    pub(super) routes: bool,
    pub(super) firewall: bool,
    /// Addresses, default routes, sysctls: what decides how the scheme looks.
    pub(super) facts: bool,
}

impl Parts {
    pub(super) const ALL: Self = Self {
        rules: true,
        routes: true,
        firewall: true,
        facts: true,
    };

    /// Whether a piece of a pathway may be gone.
    pub(super) fn pieces(self) -> bool {
        self.rules || self.routes || self.firewall
    }

    pub(super) fn any(self) -> bool {
        self.pieces() || self.facts
    }
}

/// What was told since the last look.
#[derive(Debug, Default)]
pub(super) struct News {
    /// What is to be read again.
    pub(super) parts: Parts,
    /// Who deleted what.
    pub(super) culprits: Culprits,
    /// Whether messages were lost: then everything may have changed.
    pub(super) overrun: bool,
}

/// A socket that only listens.
#[derive(Debug)]
struct Descriptor(OwnedFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Both sockets.
#[derive(Debug)]
pub(super) struct Events {
    route: AsyncFd<Descriptor>,
    /// None in a kernel without nf_tables.
    nftables: Option<AsyncFd<Descriptor>>,
    buffer: Vec<u8>,
    /// Families of the transaction that is being told, where it deletes something in a table of interest.
    deleting: Vec<Option<Family>>,
}

impl Events {
    /// Subscribes, in the caller's network namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the kernel refuses: without `CAP_NET_ADMIN` it does.
    pub(super) fn open() -> io::Result<Self> {
        let route = subscribe(SockProtocol::NetlinkRoute, &ROUTE_GROUPS)?;
        let nftables = match subscribe(SockProtocol::NetlinkNetFilter, &NFTABLES_GROUPS) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self {
            route,
            nftables,
            buffer: vec![0; MESSAGE],
            deleting: Vec::new(),
        })
    }

    /// Waits until something was told. Cancel-safe: what was told stays to be taken.
    pub(super) async fn wait(&self) -> io::Result<()> {
        let nftables = async {
            match &self.nftables {
                Some(socket) => socket.readable().await.map(drop),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = self.route.readable() => ready.map(drop),
            ready = nftables => ready,
        }
    }

    /// Adds what was told until now to the news. `tables` are the pathways' routing tables.
    pub(super) fn take(&mut self, tables: &BTreeSet<u32>, news: &mut News) -> io::Result<()> {
        let Self {
            route,
            nftables,
            buffer,
            deleting,
        } = self;
        drain(route, buffer, news, |message, news| {
            of_routing(message, tables, news);
        })?;
        if let Some(socket) = nftables {
            drain(socket, buffer, news, |message, news| {
                of_nftables(message, deleting, news);
            })?;
        }
        Ok(())
    }
}

fn subscribe(protocol: SockProtocol, groups: &[u32]) -> io::Result<AsyncFd<Descriptor>> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    // past net.core.rmem_max, which is made for other sockets; not allowed in a user namespace
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
    }
    let groups = groups.iter().fold(0, |mask, group| mask | 1 << (group - 1));
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    // SAFETY: the AsyncFd owns the socket, whose number therefore stays the same and open for as long as
    // it is registered
    #[expect(
        unsafe_code,
        reason = "tokio cannot know that the number stays the same"
    )]
    let registered = unsafe { AsyncFd::register(Descriptor(socket)) };
    registered.map_err(io::Error::from)
}

fn drain(
    socket: &AsyncFd<Descriptor>,
    buffer: &mut [u8],
    news: &mut News,
    mut of: impl FnMut(&Message<'_>, &mut News),
) -> io::Result<()> {
    let number = socket.as_raw_fd();
    let receive = |buffer: &mut [u8]| Ok(recv(number, buffer, MsgFlags::MSG_DONTWAIT)?);
    for _ in 0..AT_A_TIME {
        // the runtime may not have noticed yet that there is something; and where there is nothing, it
        // must learn that, or the next wait would not wait
        let received = match receive(buffer) {
            Err(error) if io::Error::kind(&error) == ErrorKind::WouldBlock => {
                socket.try_io(tokio::io::Interest::READABLE, |_| receive(buffer))
            }
            received => received,
        };
        let length = match received {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // the kernel says once that messages were lost, and goes on
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                news.overrun = true;
                news.parts = Parts::ALL;
                continue;
            }
            Err(error) => return Err(error),
        };
        for message in messages(&buffer[..length]) {
            of(&message, news);
        }
    }
    Ok(())
}

/// One netlink message.
struct Message<'b> {
    kind: u16,
    port: u32,
    /// With the header.
    whole: &'b [u8],
    body: &'b [u8],
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..16)?;
        let length = usize::try_from(number(header, 0)).ok()?;
        let whole = bytes.get(..length).filter(|whole| whole.len() >= 16)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            port: number(header, 12),
            whole,
            body: &whole[16..],
        })
    })
}

/// Four bytes in the machine's order; 0 where they are missing.
fn number(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    four.map_or(0, u32::from_ne_bytes)
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        // the two upper bits are flags
        if u16::from_ne_bytes([c, d]) & 0x3fff == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn of_routing(message: &Message<'_>, tables: &BTreeSet<u32>, news: &mut News) {
    let parts = &mut news.parts;
    match message.kind {
        libc::RTM_NEWRULE => parts.rules = true,
        libc::RTM_DELRULE => {
            parts.rules = true;
            let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message.whole);
            if let Ok(parsed) = parsed
                && let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRule(rule)) =
                    parsed.payload
                && let Some(family) = family(rule.header.family)
                && let Ok(rule) = netlink::found_rule(family, &rule)
            {
                news.culprits.rule(rule, Who::of_port(message.port));
            }
        }
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            if number(message.body, 8) & CLONED != 0 {
                return;
            }
            let short = message.body.get(4).copied().unwrap_or_default();
            let table = attribute(message.body.get(12..).unwrap_or_default(), ROUTE_TABLE)
                .map_or(u32::from(short), |value| number(value, 0));
            if !tables.contains(&table) {
                parts.facts = true;
                return;
            }
            parts.routes = true;
            let family = message.body.first().copied().map(RouteFamily::from);
            if message.kind == libc::RTM_DELROUTE
                && let Some(family) = family.and_then(self::family)
            {
                let who = Who::of_port(message.port);
                news.culprits.route(family, table, who);
            }
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR | libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            parts.facts = true;
            // with lo, or its last IPv6 address, the tables' routes go
            parts.routes |= number(message.body, 4) == LO;
        }
        _ => {}
    }
}

fn family(family: RouteFamily) -> Option<Family> {
    match family {
        RouteFamily::Inet => Some(Family::V4),
        RouteFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

/// A transaction is told as one message for each object, then the new generation with its author.
fn of_nftables(message: &Message<'_>, deleting: &mut Vec<Option<Family>>, news: &mut News) {
    if message.kind >> 8 != NFTABLES {
        return;
    }
    let kind = message.kind & 0xff;
    let attributes = message.body.get(4..).unwrap_or_default();
    if kind == NEW_GENERATION {
        for family in deleting.drain(..) {
            news.culprits.firewall(family, author(attributes));
        }
        return;
    }
    let table = attribute(attributes, TABLE).and_then(|name| name.split(|byte| *byte == 0).next());
    if !table.is_some_and(|name| TABLES.contains(&name)) {
        return;
    }
    news.parts.firewall = true;
    if DELETIONS.contains(&kind) {
        let family = message.body.first().copied().map(RouteFamily::from);
        deleting.push(family.and_then(self::family));
    }
}

fn author(attributes: &[u8]) -> Who {
    let pid = attribute(attributes, GENERATION_PID).and_then(|value| value.try_into().ok());
    let name = attribute(attributes, GENERATION_NAME).map(|name| {
        String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned()
    });
    match pid.map(u32::from_be_bytes) {
        Some(pid) => Who::Process { pid, name },
        None => Who::Unknown,
    }
}
