//! The words of the project as types that cannot be wrong.
//!
//! Owns: marks, tables, names, pathways, instances and the allow list as values, with the one text
//! form of each. Must not know: where a value was read, the kernel, sockets.

mod access;
mod addr;
mod allow;
mod duration;
mod instance;
mod listen;
mod network;
mod options;
mod pathway;
mod target;

pub use access::{SocketMode, SocketOwner};
pub use addr::{ClientAddr, Family, ListenAddr, ProxyAddr, TargetAddr};
pub use allow::{AllowList, parse_prefix, prefix_text};
pub use duration::{MAX_DURATION, parse_duration};
pub use instance::{Instance, InstanceName, Protocol, TargetPorts};
pub use listen::{Endpoint, Listen, ListenRange, PortRange, SocketPath};
pub use network::{Interception, ListenNetwork};
pub use options::{InstanceOptions, ListenMode, PortPolicy, UdpHeader};
pub use pathway::{ConnmarkMode, Mark, Mask, Pathway, Priority, TRANSPARENT_MARK, TableId};
pub use target::{Answers, NamedTargets, TargetName};

/// Why a text is not a value of the model.
///
/// `expected` reads as the end of a sentence: "expected …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}: expected {expected}")]
pub struct ValueError {
    /// What is wrong with the text, lowercase, naming it.
    pub problem: String,
    /// What would have been right.
    pub expected: String,
}

impl ValueError {
    /// An error from its two halves.
    pub fn new(problem: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            expected: expected.into(),
        }
    }
}
