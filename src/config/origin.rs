//! Where a process's relays come from: the files of a directory, flags, or a JSON file. Each can be read
//! again for a reload.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::networks::Networks;
use super::source::Source;
use super::{
    ALLOW, ALLOW_LIST_PATH, Configuration, Diagnostic, Diagnostics, PATHWAYS, allow, json_form,
};
use crate::model::{AllowList, Instance, Listen, Mark, Pathway};

/// Where relays come from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The three files of this directory.
    Files(PathBuf),
    /// Somewhere else.
    Standalone(Standalone),
}

/// Relays that are in no instances.tsv.
#[derive(Debug, Clone)]
pub struct Standalone {
    /// Which.
    pub relays: Relays,
    /// Whom they believe.
    pub trusted: Trusted,
    /// The configuration directory, for a pathways.conf and an allow list that may be there.
    pub directory: PathBuf,
}

/// Which relays.
#[derive(Debug, Clone)]
pub enum Relays {
    /// These.
    Given(Vec<Instance>),
    /// The routes of a JSON file.
    Json(PathBuf),
}

/// Whom relays believe.
#[derive(Debug, Clone)]
pub enum Trusted {
    /// `$ALLOW_LIST_PATH`, else allow.txt in the configuration directory.
    Usual,
    /// Those in this file.
    File(PathBuf),
    /// These.
    These(Vec<IpNet>),
    /// Everyone, which somebody has asked for.
    Everyone,
}

impl Origin {
    /// Reads everything, again where it was read before.
    ///
    /// # Errors
    /// Every mistake.
    pub fn load(&self) -> Result<Configuration, Diagnostics> {
        match self {
            Self::Files(directory) => super::load(directory),
            Self::Standalone(standalone) => standalone.load(),
        }
    }
}

/// Whether the kernel has IPv6: where it has not, a wildcard is IPv4 only.
pub fn has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

impl Standalone {
    fn load(&self) -> Result<Configuration, Diagnostics> {
        let mut found = Diagnostics::default();
        let instances = match &self.relays {
            Relays::Given(instances) => instances.clone(),
            Relays::Json(path) => match json_form::read(path, has_ipv6()) {
                Ok((form, warnings)) => {
                    found.extend(warnings);
                    form.instances
                }
                Err(mistakes) => {
                    found.extend(mistakes);
                    Vec::new()
                }
            },
        };
        self.refuse_loops(&instances, &mut found);
        let (list, path) = self.trusted(&mut found);
        match list {
            Some(list) if found.errors() == 0 => Ok(Configuration {
                directory: self.directory.clone(),
                pathways: self.pathways(&instances, &mut found),
                networks: Networks::of_instances(&(&self.place()).into(), &instances),
                instances,
                default_allow: Arc::new(list),
                default_allow_path: path,
                warnings: found.sorted(),
                own_allow: BTreeMap::new(),
            }),
            _ => Err(found.sorted()),
        }
    }

    /// Where relays are written.
    fn place(&self) -> Arc<Path> {
        match &self.relays {
            Relays::Given(_) => Arc::from(Path::new("command line")),
            Relays::Json(path) => Arc::from(path.as_path()),
        }
    }

    /// A target that is the relay's own listener would be connected to for ever.
    fn refuse_loops(&self, instances: &[Instance], found: &mut Diagnostics) {
        let place = self.place();
        for instance in instances {
            // a target may well be among the addresses that are intercepted on their way here
            let (Listen::Address(_) | Listen::Range(_), Some(range)) =
                (&instance.listen, instance.listen.ports())
            else {
                continue;
            };
            let listen = range.first();
            let own = |target: SocketAddr| {
                let wildcard = listen.ip().is_unspecified()
                    && listen.is_ipv4() == target.is_ipv4()
                    && target.ip().is_loopback();
                target.port() == listen.port() && (target.ip() == listen.ip() || wildcard)
            };
            let mut targets = instance.targets().map(|target| target.get());
            if let Some(target) = targets.find(|target| own(*target)) {
                found.push(Diagnostic::error(
                    &place,
                    format!("target {target} is where the relay itself listens, on {listen}"),
                    "the service's address and port",
                ));
            }
        }
    }

    /// The list and where it is.
    fn trusted(&self, found: &mut Diagnostics) -> (Option<AllowList>, PathBuf) {
        let path = match &self.trusted {
            Trusted::Usual => usual(
                &self.directory,
                std::env::var_os(ALLOW_LIST_PATH).as_deref(),
            ),
            Trusted::File(path) => path.clone(),
            Trusted::These(prefixes) => {
                return (AllowList::new(prefixes.iter().copied()), PathBuf::new());
            }
            Trusted::Everyone => {
                let everyone = [
                    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
                    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
                ];
                return (AllowList::new(everyone), PathBuf::new());
            }
        };
        let list = match Source::read(path.clone()) {
            Ok(source) => allow::parse(&source, found),
            Err(error) => {
                found.push(super::unreadable(&path, &error, super::FOR_ALLOW));
                None
            }
        };
        (list, path)
    }

    /// The pathways of the instances' marks: as in pathways.conf where that has them, else with the defaults.
    fn pathways(&self, instances: &[Instance], found: &mut Diagnostics) -> Vec<Pathway> {
        let files = super::load_pathways(&self.directory).unwrap_or_else(|_| {
            let file = Arc::from(self.directory.join(PATHWAYS));
            found.push(Diagnostic::warning(
                &file,
                "not read, for it or instances.tsv has mistakes: pathways have their defaults",
                "what mmproxyctl check says of the two files",
            ));
            super::PathwayFiles {
                directory: self.directory.clone(),
                pathways: Vec::new(),
                instances: Vec::new(),
                warnings: Diagnostics::default(),
                networks: Networks::default(),
            }
        });
        let mut marks: Vec<Mark> = instances.iter().filter_map(|one| one.mark).collect();
        marks.sort_unstable();
        marks.dedup();
        let mut pathways: Vec<Pathway> = marks
            .into_iter()
            .filter_map(|mark| files.pathway_or_defaults(mark))
            .collect();
        super::merge_targets(&mut pathways, instances);
        pathways
    }
}

/// Where the allow list is that nobody named.
fn usual(directory: &Path, named: Option<&OsStr>) -> PathBuf {
    match named.filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => directory.join(ALLOW),
    }
}
