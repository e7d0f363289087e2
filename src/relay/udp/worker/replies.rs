//! Sockets to answer from, where a transparent listener gets what was sent to other ports than its own: an
//! answer's port is that of the socket that sends it.
//!
//! Owns: which of them stay open. Must not know: flows.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};

use crate::socket::Failure;
use crate::socket::udp::answering_from;

/// How many stay open in a worker: as many places are answered from without opening any.
const KEPT: usize = 1024;

/// The sockets of a worker.
#[derive(Debug)]
pub(super) struct Replies {
    open: HashMap<SocketAddr, UdpSocket>,
    kept: usize,
}

impl Replies {
    /// Those beside a listener.
    ///
    /// Beside a wildcard, rules of somebody else's hand over what they like, perhaps only part of what is
    /// sent to one of this host's own ports: a socket that stayed there would take the rest.
    pub(super) fn beside(listener: SocketAddr) -> Self {
        let anywhere = listener.ip().is_unspecified();
        Self {
            open: HashMap::new(),
            kept: if anywhere { 1 } else { KEPT },
        }
    }

    /// The one that is bound there.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(super) fn at(&mut self, addr: SocketAddr) -> Result<&UdpSocket, Failure> {
        if !self.open.contains_key(&addr) {
            if self.open.len() >= self.kept {
                // to know which was used last would cost every answer more than opening one now and then
                self.open.clear();
            }
            self.open.insert(addr, answering_from(addr)?);
        }
        Ok(&self.open[&addr])
    }

    /// Closes what must not stay open beyond a round.
    pub(super) fn rest(&mut self) {
        if self.kept == 1 {
            self.open.clear();
        }
    }
}
