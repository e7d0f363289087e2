//! `check`: validates the three files and shows what they say. Changes nothing, and
//! asks this host for nothing but what a transparent listener could take from it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::output::{print_json, results, table, trimmed};
use crate::cli::{CheckArgs, Global};
use crate::config::{self, Configuration, Diagnostics};
use crate::model::{AllowList, ConnmarkMode, Family, Instance, Pathway, prefix_text};

/// Runs the verb.
pub(super) fn run(global: &Global, args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let mut loaded = config::load(&global.config_dir);
    if let Ok(configuration) = &mut loaded {
        configuration.warn_of_own(super::own::look);
    }
    match loaded {
        Ok(configuration) if args.json => {
            print_json(&Valid::new(&configuration))?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(configuration) => {
            if !configuration.warnings.is_empty() {
                eprintln!("{}\n", super::drawn(&configuration.warnings));
            }
            results().write_all(summary(&configuration).as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        Err(mistakes) if args.json => {
            print_json(&Invalid::new(&global.config_dir, &mistakes))?;
            Ok(ExitCode::from(2))
        }
        Err(mistakes) => Err(mistakes.into()),
    }
}

/// `--json` of files without a mistake.
#[derive(Serialize)]
struct Valid<'c> {
    valid: bool,
    config_dir: &'c Path,
    pathways: &'c [Pathway],
    instances: Vec<InstanceAndList<'c>>,
    allow_list: List<'c>,
    errors: usize,
    diagnostics: &'c Diagnostics,
}

#[derive(Serialize)]
struct InstanceAndList<'c> {
    #[serde(flatten)]
    instance: &'c Instance,
    /// Who may connect, from `allow=` or the default list.
    allowed: Vec<String>,
}

#[derive(Serialize)]
struct List<'c> {
    path: &'c Path,
    allowed: Vec<String>,
}

impl<'c> Valid<'c> {
    fn new(configuration: &'c Configuration) -> Self {
        let instances = configuration
            .instances
            .iter()
            .map(|instance| InstanceAndList {
                instance,
                allowed: prefixes(&configuration.allow_list(instance)),
            })
            .collect();
        Self {
            valid: true,
            config_dir: &configuration.directory,
            pathways: &configuration.pathways,
            instances,
            allow_list: List {
                path: &configuration.default_allow_path,
                allowed: prefixes(&configuration.default_allow),
            },
            errors: 0,
            diagnostics: &configuration.warnings,
        }
    }
}

/// `--json` of files with mistakes.
#[derive(Serialize)]
struct Invalid<'c> {
    valid: bool,
    config_dir: &'c Path,
    /// How many mistakes; of very many, not all are in the list, which has the warnings too.
    errors: usize,
    diagnostics: &'c Diagnostics,
}

impl<'c> Invalid<'c> {
    fn new(config_dir: &'c Path, mistakes: &'c Diagnostics) -> Self {
        Self {
            valid: false,
            config_dir,
            errors: mistakes.errors(),
            diagnostics: mistakes,
        }
    }
}

/// Addresses bare, networks with their length.
fn prefixes(list: &AllowList) -> Vec<String> {
    list.prefixes().iter().map(prefix_text).collect()
}

fn summary(configuration: &Configuration) -> String {
    let Configuration {
        directory,
        pathways,
        instances,
        default_allow,
        default_allow_path,
        ..
    } = configuration;
    format!(
        "{} is valid: {}, {}\n\n{}\n\n{}\n\nallow list {}: {}\n",
        directory.display(),
        counted(pathways.len(), "pathway"),
        counted(instances.len(), "instance"),
        pathway_table(pathways),
        instance_table(instances),
        default_allow_path.display(),
        prefixes(default_allow).join(", "),
    )
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn pathway_table(pathways: &[Pathway]) -> String {
    let mut table = table([
        "PATHWAY", "NAME", "TABLE", "PRIORITY", "MASK", "CONNMARK", "TARGETS",
    ]);
    for pathway in pathways {
        let targets: Vec<String> = ["loopback".to_owned()]
            .into_iter()
            .chain(pathway.targets.iter().map(ToString::to_string))
            .collect();
        table.add_row([
            pathway.mark.to_string(),
            pathway.name.clone().unwrap_or_else(|| "-".to_owned()),
            pathway.table.to_string(),
            pathway.priority.to_string(),
            pathway.mask.to_string(),
            match pathway.connmark {
                ConnmarkMode::Always => "always",
                ConnmarkMode::Auto => "auto",
                ConnmarkMode::Off => "off",
            }
            .to_owned(),
            targets.join(", "),
        ]);
    }
    trimmed(&table)
}

fn instance_table(instances: &[Instance]) -> String {
    let mut table = table([
        "INSTANCE",
        "PATHWAY",
        "LISTEN",
        "IPV4 TARGET",
        "IPV6 TARGET",
        "OPTIONS",
    ]);
    for instance in instances {
        let target = |family| instance.target_of(family).unwrap_or_else(|| "-".to_owned());
        table.add_row([
            instance.name.to_string(),
            instance
                .mark
                .map_or_else(|| "-".to_owned(), |mark| mark.to_string()),
            format!("{} {}", instance.options.protocol, instance.listen),
            target(Family::V4),
            target(Family::V6),
            instance.options.to_string(),
        ]);
    }
    trimmed(&table)
}
