//! What a reload has to do: the difference between two sets of instances. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{AllowList, Instance, InstanceOptions, Listen, Protocol};

/// All that a relay is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) instance: Instance,
    pub(super) allow: Arc<AllowList>,
}

/// Specs by instance name.
pub(super) type Specs = BTreeMap<String, Spec>;

/// What becomes of each instance, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// Not there before.
    pub(super) start: Vec<String>,
    /// Not there any more.
    pub(super) stop: Vec<String>,
    /// On the same sockets, treated otherwise from now on.
    pub(super) set: Vec<String>,
    /// At other ports of the same address, over UDP: the relay and its flows stay.
    pub(super) relisten: Vec<String>,
    /// On another address, or on more or fewer sockets: a new relay, while the old one drains.
    pub(super) replace: Vec<String>,
    /// As before.
    pub(super) unchanged: Vec<String>,
}

impl Difference {
    /// From what there is to what is wanted.
    pub(super) fn between(present: &Specs, wanted: &Specs) -> Self {
        let mut difference = Self::default();
        for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
            difference.stop.push(name.clone());
        }
        for (name, spec) in wanted {
            let list = match present.get(name) {
                None => &mut difference.start,
                Some(before) if before == spec => &mut difference.unchanged,
                Some(before) if same_sockets(before, spec) => &mut difference.set,
                Some(before) if other_ports(before, spec) => &mut difference.relisten,
                Some(_) => &mut difference.replace,
            };
            list.push(name.clone());
        }
        difference
    }
}

fn same_sockets(before: &Spec, after: &Spec) -> bool {
    let file = |spec: &Spec| {
        let options = &spec.instance.options;
        (options.socket_mode, options.socket_owner.clone())
    };
    let (old, new) = (&before.instance.options, &after.instance.options);
    // flows are known to the relay that they came to: another one would lose those whose client only their
    // first datagram named
    let listeners = |of: &InstanceOptions| match of.protocol {
        Protocol::Tcp => of.listeners,
        Protocol::Udp => None,
    };
    before.instance.listen == after.instance.listen
        && file(before) == file(after)
        && old.protocol == new.protocol
        && listeners(old) == listeners(new)
}

/// Whether all that changes of the sockets are a UDP relay's ports.
fn other_ports(before: &Spec, after: &Spec) -> bool {
    let address = |Spec { instance, .. }: &Spec| {
        let listen = match (instance.options.protocol, &instance.listen) {
            (Protocol::Udp, Listen::Address(_) | Listen::Range(_)) => instance.listen.ports(),
            _ => None,
        };
        listen.map(|ports| {
            // with the scope of a link-local one
            let mut address = ports.first();
            address.set_port(0);
            address
        })
    };
    address(before).is_some() && address(before) == address(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ListenAddr, NamedTargets, TargetPorts, parse_prefix};

    fn spec(name: &str, port: u16) -> (String, Spec) {
        let instance = Instance {
            name: name.parse().unwrap(),
            mark: Some("123".parse().unwrap()),
            listen: ListenAddr::new(([127, 0, 0, 1], port).into()).into(),
            target4: Some("127.0.0.1:22".parse().unwrap()),
            target6: None,
            target_ports: TargetPorts::One,
            named: NamedTargets::default(),
            options: InstanceOptions::defaults(Protocol::Tcp),
        };
        let allow = Arc::new(AllowList::new([parse_prefix("10.0.0.1").unwrap()]).unwrap());
        (name.to_owned(), Spec { instance, allow })
    }

    fn udp((name, mut spec): (String, Spec)) -> (String, Spec) {
        spec.instance.options = InstanceOptions::defaults(Protocol::Udp);
        (name, spec)
    }

    #[test]
    fn each_kind_of_change() {
        let present = Specs::from([
            spec("gone", 1),
            spec("kept", 2),
            spec("moved", 3),
            spec("retargeted", 4),
            spec("believes-others", 5),
            spec("wider", 6),
            udp(spec("flows-stay", 7)),
            udp(spec("flows-stay-elsewhere", 8)),
            udp(spec("becomes-tcp", 9)),
        ]);
        let mut wanted = Specs::from([spec("kept", 2), spec("moved", 30), spec("new", 1)]);
        let (name, mut retargeted) = spec("retargeted", 4);
        retargeted.instance.target4 = Some("127.0.0.1:2200".parse().unwrap());
        wanted.insert(name, retargeted);
        let (name, mut believing) = spec("believes-others", 5);
        believing.allow = Arc::new(AllowList::new([parse_prefix("10.0.0.2").unwrap()]).unwrap());
        wanted.insert(name, believing);
        let (name, mut wider) = spec("wider", 6);
        wider.instance.options.listeners = Some(4.try_into().unwrap());
        wanted.insert(name, wider);
        let (name, mut wider) = udp(spec("flows-stay", 7));
        wider.instance.options.listeners = Some(4.try_into().unwrap());
        wanted.insert(name, wider);
        wanted.extend([
            udp(spec("flows-stay-elsewhere", 80)),
            spec("becomes-tcp", 9),
        ]);
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            Difference::between(&present, &wanted),
            Difference {
                start: names(&["new"]),
                stop: names(&["gone"]),
                set: names(&["believes-others", "flows-stay", "retargeted"]),
                relisten: names(&["flows-stay-elsewhere"]),
                replace: names(&["becomes-tcp", "moved", "wider"]),
                unchanged: names(&["kept"]),
            }
        );
    }
}
