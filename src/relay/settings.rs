//! What one relay is told: values only, nothing that was read from a file here.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{
    AllowList, Family, Instance, InstanceName, InstanceOptions, Mark, PortPolicy, TargetAddr,
};

/// How one relay treats its connections.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The instance's name, in every log line.
    pub name: InstanceName,
    /// The mark of its pathway, on every spoofed connection; `None` leaves them unmarked.
    pub mark: Option<Mark>,
    /// Where IPv4 clients go; `None` refuses them.
    pub target4: Option<TargetAddr>,
    /// Where IPv6 clients go; `None` refuses them.
    pub target6: Option<TargetAddr>,
    /// The proxies that are believed.
    pub allow: Arc<AllowList>,
    /// How long a proxy may take to send its header.
    pub header_timeout: Duration,
    /// How long the target may take to answer.
    pub connect_timeout: Duration,
    /// After how long without a byte either way a connection ends; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Whether the client's port is kept.
    pub port: PortPolicy,
    /// How many connections may be open at a time.
    pub max_connections: Option<NonZeroU32>,
    /// How many connections may wait for their header at a time.
    pub max_waiting: NonZeroU32,
}

impl Settings {
    /// How many connections may wait for their header: far above what a busy proxy needs, far below
    /// what a silent one could otherwise hold in descriptors.
    pub const DEFAULT_MAX_WAITING: NonZeroU32 = NonZeroU32::new(16_384).unwrap();

    /// What an instance says, with its allow list.
    pub fn of(instance: &Instance, allow: Arc<AllowList>) -> Self {
        let InstanceOptions {
            header_timeout,
            connect_timeout,
            idle_timeout,
            port,
            max_connections,
            ..
        } = instance.options;
        Self {
            name: instance.name.clone(),
            mark: instance.mark,
            target4: instance.target(Family::V4),
            target6: instance.target(Family::V6),
            allow,
            header_timeout,
            connect_timeout,
            idle_timeout,
            port,
            max_connections,
            max_waiting: Self::DEFAULT_MAX_WAITING,
        }
    }

    /// Where clients of a family go.
    pub fn target(&self, family: Family) -> Option<TargetAddr> {
        match family {
            Family::V4 => self.target4,
            Family::V6 => self.target6,
        }
    }
}
