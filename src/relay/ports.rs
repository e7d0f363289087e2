//! What came to each port of a relay that listens on many.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::model::{Endpoint, PortRange};
use crate::socket::stream::StreamListener;

/// A port and what came to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The port.
    pub port: u16,
    /// Connections accepted, or flows begun.
    pub accepted: u64,
}

/// One count for each port from the first to the last; none where there is only one port.
#[derive(Debug, Default)]
pub(super) struct Ports {
    first: u16,
    counts: Box<[AtomicU64]>,
}

impl Ports {
    /// For the ports of these listeners, and those that one transparent listener gets connections for.
    pub(super) fn of(
        listeners: &[Arc<StreamListener>],
        intercepted: Option<PortRange>,
    ) -> io::Result<Self> {
        if let Some(ports) = intercepted {
            return Ok(Self::from_ports(&[ports.first(), ports.last()]));
        }
        let mut ports = Vec::with_capacity(listeners.len());
        for listener in listeners {
            if let Endpoint::Inet(addr) = listener.endpoint()? {
                ports.push(addr.port());
            }
        }
        Ok(Self::from_ports(&ports))
    }

    /// For these ports.
    pub(super) fn from_ports(ports: &[u16]) -> Self {
        match (ports.iter().min(), ports.iter().max()) {
            (Some(&first), Some(&last)) if first < last => Self {
                first,
                counts: (first..=last).map(|_| AtomicU64::new(0)).collect(),
            },
            _ => Self::default(),
        }
    }

    /// One more came to this port.
    pub(super) fn count(&self, port: u16) {
        self.add_to(port, 1);
    }

    /// As much came to these ports as others have counted, where they are the same.
    pub(super) fn add(&self, others: &Self) {
        for Port { port, accepted } in others.read() {
            self.add_to(port, accepted);
        }
    }

    fn add_to(&self, port: u16, more: u64) {
        let at = usize::from(port.wrapping_sub(self.first));
        if let Some(count) = self.counts.get(at) {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// The ports to which anything came.
    pub(super) fn read(&self) -> Vec<Port> {
        let counted = (self.first..=u16::MAX)
            .zip(&self.counts)
            .map(|(port, count)| Port {
                port,
                accepted: count.load(Ordering::Relaxed),
            });
        counted.filter(|one| one.accepted > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_counted_where_there_are_several() {
        let ports = Ports::from_ports(&[65535, 65533, 65534]);
        for port in [65533, 65535, 65535, 1] {
            ports.count(port);
        }
        let seen: Vec<_> = ports
            .read()
            .iter()
            .map(|one| (one.port, one.accepted))
            .collect();
        assert_eq!(seen, [(65533, 1), (65535, 2)]);
        let one = Ports::from_ports(&[22, 22]);
        one.count(22);
        assert!(one.read().is_empty());
    }
}
