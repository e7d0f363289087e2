//! Text → model: `pathways.conf`, `instances.tsv` and `allow.txt`.
//!
//! Owns: the files, where they are looked for, and every mistake in them, shown with file, line and
//! column, all of them at once. Must not know: the kernel, sockets, what the values are used for.

mod allow;
mod columns;
mod destinations;
mod diagnostics;
mod instance_options;
mod instances;
mod json_form;
mod networks;
mod options;
mod origin;
mod pathways;
#[cfg(test)]
mod properties;
mod source;
mod targets;
#[cfg(test)]
mod tests;
mod together;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

pub use diagnostics::{Diagnostic, Diagnostics, Severity};
pub use instance_options::{OPTIONS, from_words, listen_as_told};
pub use json_form::{JsonForm, read as read_json};
use networks::Networks;
pub use networks::Own;
pub use origin::{Origin, Relays, Standalone, Trusted, has_ipv6};
use source::Source;

use crate::model::{AllowList, Answers, Instance, Mark, Pathway, Protocol};

const PATHWAYS: &str = "pathways.conf";
const INSTANCES: &str = "instances.tsv";
const ALLOW: &str = "allow.txt";

/// Where the default allow list is, when it is not in the configuration directory.
pub const ALLOW_LIST_PATH: &str = "ALLOW_LIST_PATH";

/// All three files, without a mistake.
#[derive(Debug, Clone)]
pub struct Configuration {
    /// The configuration directory.
    pub directory: PathBuf,
    /// In the order of the file, with the instances' non-loopback targets merged in.
    pub pathways: Vec<Pathway>,
    /// In the order of the file.
    pub instances: Vec<Instance>,
    /// Who may connect to instances without a list of their own.
    pub default_allow: Arc<AllowList>,
    /// Where that list was read.
    pub default_allow_path: PathBuf,
    /// What is no mistake and worth a look.
    pub warnings: Diagnostics,
    networks: Networks,
    /// By `allow=` as written.
    own_allow: BTreeMap<PathBuf, Arc<AllowList>>,
}

impl Configuration {
    /// The pathway of a mark.
    pub fn pathway(&self, mark: Mark) -> Option<&Pathway> {
        self.pathways.iter().find(|pathway| pathway.mark == mark)
    }

    /// The pathway of an instance, where it has a mark.
    pub fn pathway_of(&self, instance: &Instance) -> Option<&Pathway> {
        instance.mark.and_then(|mark| self.pathway(mark))
    }

    /// The instance of a name.
    pub fn instance(&self, name: &str) -> Option<&Instance> {
        self.instances
            .iter()
            .find(|instance| instance.name.as_str() == name)
    }

    /// The same with the addresses that names of targets have now, which the pathways of these targets serve
    /// too, and those that they had before.
    pub fn with_answers(&self, answers: &Answers) -> Self {
        let mut resolved = self.clone();
        fill(&mut resolved.pathways, &mut resolved.instances, answers);
        resolved
    }

    /// Warns of what transparent listeners take away from the host that is to have them; what that has of its
    /// own is asked for only where there are such listeners.
    pub fn warn_of_own(&mut self, own: impl FnOnce() -> Own) {
        self.networks.warn(own, &mut self.warnings);
    }

    /// The proxies that may connect to an instance of this configuration: those of its `allow=`, else the default list.
    pub fn allow_list(&self, instance: &Instance) -> Arc<AllowList> {
        let own = instance
            .options
            .allow
            .as_ref()
            .and_then(|file| self.own_allow.get(file));
        Arc::clone(own.unwrap_or(&self.default_allow))
    }
}

/// What routing needs of the files: no allow list, and either file may be missing.
#[derive(Debug, Clone)]
pub struct PathwayFiles {
    /// The configuration directory.
    pub directory: PathBuf,
    /// In the order of the file, with the instances' non-loopback targets merged in.
    pub pathways: Vec<Pathway>,
    /// In the order of the file.
    pub instances: Vec<Instance>,
    /// What is no mistake and worth a look.
    pub warnings: Diagnostics,
    networks: Networks,
}

impl PathwayFiles {
    /// As [`Configuration::warn_of_own`].
    pub fn warn_of_own(&mut self, own: impl FnOnce() -> Own) {
        self.networks.warn(own, &mut self.warnings);
    }

    /// As [`Configuration::with_answers`].
    pub fn with_answers(&self, answers: &Answers) -> Self {
        let mut resolved = self.clone();
        fill(&mut resolved.pathways, &mut resolved.instances, answers);
        resolved
    }

    /// The pathway of a mark that is in pathways.conf.
    pub fn pathway(&self, mark: Mark) -> Option<&Pathway> {
        self.pathways.iter().find(|pathway| pathway.mark == mark)
    }

    /// The pathway of any mark: as in pathways.conf, else with the defaults and the targets of the
    /// instances that use it. `None` where the mark can be no table number (253 to 255).
    pub fn pathway_or_defaults(&self, mark: Mark) -> Option<Pathway> {
        if let Some(pathway) = self.pathway(mark) {
            return Some(pathway.clone());
        }
        let mut pathway = Pathway::with_defaults(mark)?;
        merge_targets(std::slice::from_mut(&mut pathway), &self.instances);
        Some(pathway)
    }

    /// The instance of a name.
    pub fn instance(&self, name: &str) -> Option<&Instance> {
        self.instances
            .iter()
            .find(|instance| instance.name.as_str() == name)
    }
}

/// Reads all three files of a directory; the allow list from `$ALLOW_LIST_PATH` where that is set.
///
/// # Errors
/// Every mistake in every file.
pub fn load(directory: &Path) -> Result<Configuration, Diagnostics> {
    load_with(directory, std::env::var_os(ALLOW_LIST_PATH).as_deref())
}

/// Reads all three files of a directory, whatever `$ALLOW_LIST_PATH` says.
///
/// # Errors
/// Every mistake in every file.
pub fn load_without_environment(directory: &Path) -> Result<Configuration, Diagnostics> {
    load_with(directory, None)
}

/// [`load`] with the value of the environment variable as an argument.
fn load_with(
    directory: &Path,
    allow_list_path: Option<&OsStr>,
) -> Result<Configuration, Diagnostics> {
    let mut found = Diagnostics::default();
    // set but empty counts as not set, as it did in the shell set-up
    let allow_list_path = allow_list_path.filter(|path| !path.is_empty());
    let default_allow_path = match allow_list_path {
        Some(path) => PathBuf::from(path),
        None => directory.join(ALLOW),
    };
    // one complaint about a directory that is missing, not one for each file that is not in it
    let directory_problem = match std::fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some(io::Error::from(io::ErrorKind::NotADirectory)),
        Err(error) => Some(error),
    };
    if let Some(error) = &directory_problem {
        found.push(unreadable(directory, error, DIRECTORY));
    }
    let mut read = |path: PathBuf, expected: &str, in_directory: bool| {
        if in_directory && directory_problem.is_some() {
            return None;
        }
        Source::read(path.clone())
            .map_err(|error| found.push(unreadable(&path, &error, expected)))
            .ok()
    };
    let pathway_source = read(directory.join(PATHWAYS), IN_DIRECTORY, true);
    let instance_source = read(directory.join(INSTANCES), IN_DIRECTORY, true);
    let allow_source = read(
        default_allow_path.clone(),
        FOR_ALLOW,
        allow_list_path.is_none(),
    );

    let pathway_lines = pathway_source
        .as_ref()
        .map(|source| pathways::parse(source, &mut found));
    let instance_lines = instance_source
        .as_ref()
        .map(|source| {
            let pathways = pathway_source.as_ref().zip(pathway_lines.as_deref());
            read_instances(source, pathways, &mut found)
        })
        .unwrap_or_default();
    let default_allow = allow_source
        .as_ref()
        .and_then(|source| allow::parse(source, &mut found))
        .map(Arc::new);
    let mut own_allow = OwnLists::new(directory, &default_allow_path, default_allow.as_ref());
    if let Some(source) = &instance_source {
        own_allow.read(source, &instance_lines, &mut found);
        if instance_lines.is_empty() && found.errors() == 0 {
            found.push(Diagnostic::warning(
                source.path(),
                "no instance is defined",
                "a line for each service behind a proxy",
            ));
        }
    }

    let networks = instance_source
        .as_ref()
        .map(|source| Networks::of_lines(source, &instance_lines))
        .unwrap_or_default();
    match default_allow {
        Some(default_allow) if found.errors() == 0 => {
            let (pathways, instances) = merged(pathway_lines.unwrap_or_default(), instance_lines);
            Ok(Configuration {
                directory: directory.to_owned(),
                pathways,
                instances,
                own_allow: own_allow.lists,
                default_allow,
                default_allow_path,
                warnings: found.sorted(),
                networks,
            })
        }
        _ => Err(found.sorted()),
    }
}

/// Reads `pathways.conf` and `instances.tsv`, as far as they are there; having neither is no mistake.
/// Without a `pathways.conf`, the marks of instances need no pathway.
///
/// # Errors
/// Every mistake in either file.
pub fn load_pathways(directory: &Path) -> Result<PathwayFiles, Diagnostics> {
    let mut found = Diagnostics::default();
    let mut read_if_there = |name: &str| match Source::read(directory.join(name)) {
        Ok(source) => Some(source),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            found.push(unreadable(&directory.join(name), &error, IN_DIRECTORY));
            None
        }
    };
    let pathway_source = read_if_there(PATHWAYS);
    let instance_source = read_if_there(INSTANCES);
    let pathway_lines = pathway_source
        .as_ref()
        .map(|source| pathways::parse(source, &mut found));
    let instance_lines = instance_source
        .as_ref()
        .map(|source| {
            let pathways = pathway_source.as_ref().zip(pathway_lines.as_deref());
            read_instances(source, pathways, &mut found)
        })
        .unwrap_or_default();
    if found.errors() > 0 {
        return Err(found.sorted());
    }
    let networks = instance_source
        .as_ref()
        .map(|source| Networks::of_lines(source, &instance_lines))
        .unwrap_or_default();
    let (pathways, instances) = merged(pathway_lines.unwrap_or_default(), instance_lines);
    Ok(PathwayFiles {
        directory: directory.to_owned(),
        pathways,
        instances,
        warnings: found.sorted(),
        networks,
    })
}

/// What was expected where the directory should be.
const DIRECTORY: &str =
    "a directory, named by --config-dir, else by $MMPROXY_CONFIG_DIR, else /etc/mmproxy";

/// What was expected of a file in the directory.
const IN_DIRECTORY: &str = "a text file in UTF-8, in the directory that --config-dir names, \
    else $MMPROXY_CONFIG_DIR, else /etc/mmproxy";

/// What was expected of the default allow list.
const FOR_ALLOW: &str = "the trusted proxies in $ALLOW_LIST_PATH, else in allow.txt in the configuration \
    directory; no list never means everyone";

fn unreadable(path: &Path, error: &io::Error, expected: &str) -> Diagnostic {
    Diagnostic::error(
        &Arc::from(path),
        format!("cannot read {}: {}", path.display(), reason(error)),
        expected,
    )
}

/// An I/O error without the number behind it.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
}

fn read_instances<'s>(
    source: &'s Source,
    pathways: Option<(&Source, &[pathways::Line<'_>])>,
    found: &mut Diagnostics,
) -> Vec<instances::Line<'s>> {
    let lines = instances::parse(source, found);
    together::check(source, &lines, found);
    // without the file there are no marks to compare with, and its absence has been said where it matters
    if let Some((of_pathways, pathways)) = pathways {
        let marks: BTreeSet<Mark> = pathways.iter().map(|line| line.mark).collect();
        together::check_marks(source, &lines, &marks, found);
        together::check_intercepted(source, &lines, of_pathways, pathways, found);
    }
    lines
}

/// The lines of files without a mistake as values.
fn merged(
    pathways: Vec<pathways::Line<'_>>,
    instances: Vec<instances::Line<'_>>,
) -> (Vec<Pathway>, Vec<Instance>) {
    let instances: Vec<Instance> = instances
        .into_iter()
        .filter_map(|line| line.instance)
        .collect();
    let mut pathways: Vec<Pathway> = pathways
        .iter()
        .filter_map(pathways::Line::pathway)
        .collect();
    merge_targets(&mut pathways, &instances);
    (pathways, instances)
}

/// Adds what instances say to the pathways of their marks: the non-loopback targets, as /32 or /128, who
/// uses them for UDP, and what is handed to transparent listeners.
fn merge_targets(pathways: &mut [Pathway], instances: &[Instance]) {
    for pathway in pathways {
        let targets = instances
            .iter()
            .filter(|instance| instance.mark == Some(pathway.mark))
            .flat_map(Instance::targets)
            .map(|target| target.ip())
            .filter(|ip| !ip.is_loopback())
            .map(IpNet::from);
        pathway.targets.extend(targets);
        let chosen = instances
            .iter()
            .filter(|instance| instance.mark == Some(pathway.mark))
            .filter_map(|instance| instance.options.destinations.as_ref())
            .flatten()
            // everything is what only the old flags can mean: rules for it would take the relay's own packets
            .filter(|prefix| !prefix.addr().is_loopback() && prefix.prefix_len() > 0);
        pathway.targets.extend(chosen);
        let udp = instances.iter().filter(|instance| {
            instance.mark == Some(pathway.mark) && instance.options.protocol == Protocol::Udp
        });
        pathway
            .udp
            .extend(udp.map(|instance| instance.name.clone()));
        let of_mark = instances
            .iter()
            .filter(|instance| instance.mark == Some(pathway.mark));
        pathway
            .interceptions
            .extend(of_mark.filter_map(Instance::interception));
    }
}

/// Puts addresses in the place of names.
fn fill(pathways: &mut [Pathway], instances: &mut [Instance], answers: &Answers) {
    for instance in instances.iter_mut() {
        *instance = instance.with_answers(answers);
    }
    merge_targets(pathways, instances);
    for pathway in pathways {
        let named = instances
            .iter()
            .filter(|instance| instance.mark == Some(pathway.mark))
            .flat_map(|instance| instance.named.wanted());
        for (name, family) in named {
            let addrs = answers.all(&name, family).iter().copied();
            let outside = addrs.filter(|ip| !ip.is_loopback());
            pathway.targets.extend(outside.map(IpNet::from));
        }
    }
}

/// The lists that instances have of their own, each file read once.
struct OwnLists<'c> {
    directory: &'c Path,
    /// By path; `None` for one with a mistake.
    read: BTreeMap<PathBuf, Option<Arc<AllowList>>>,
    /// By `allow=` as written.
    lists: BTreeMap<PathBuf, Arc<AllowList>>,
}

impl<'c> OwnLists<'c> {
    fn new(directory: &'c Path, default_path: &Path, default: Option<&Arc<AllowList>>) -> Self {
        Self {
            directory,
            read: BTreeMap::from([(default_path.to_owned(), default.cloned())]),
            lists: BTreeMap::new(),
        }
    }

    fn read(&mut self, instances: &Source, lines: &[instances::Line<'_>], found: &mut Diagnostics) {
        for (file, word) in lines.iter().filter_map(|line| line.allow.as_ref()) {
            let path = self.directory.join(file);
            let list = self.read.entry(path).or_insert_with_key(|path| {
                match Source::read(path.clone()) {
                    Ok(source) => allow::parse(&source, found).map(Arc::new),
                    Err(error) => {
                        found.push(Diagnostic::error(
                            instances.position(*word),
                            format!("cannot read {}: {}", path.display(), reason(&error)),
                            "a file with the trusted proxies of this instance; no list never means everyone",
                        ));
                        None
                    }
                }
            });
            if let Some(list) = list {
                self.lists.insert(file.clone(), Arc::clone(list));
            }
        }
    }
}
