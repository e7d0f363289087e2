//! Docker compose files: the services that call an old program.

use std::path::Path;

use yaml_rust2::{Yaml, YamlLoader};

use super::{Entry, Found, Meaning, command_line};

/// Reads a compose file.
///
/// # Errors
/// Where it is no YAML, with the line.
pub fn compose(path: &Path, text: &str) -> Result<Found, String> {
    let documents = YamlLoader::load_from_str(text).map_err(|error| {
        let at = error.marker();
        format!(
            "{}:{}: this is no YAML: {}",
            path.display(),
            at.line(),
            error.info()
        )
    })?;
    let mut found = Found::default();
    let services = documents.iter().filter_map(|one| one["services"].as_hash());
    for (name, service) in services.flatten() {
        let name = name.as_str().unwrap_or_default();
        let mut words = words(&service["entrypoint"]);
        words.extend(self::words(&service["command"]));
        // the program may be the image's own entry point
        let image = service["image"].as_str().unwrap_or_default();
        let program = image.rsplit('/').next().unwrap_or_default();
        let program = program.split([':', '@']).next().unwrap_or_default();
        if words.first().is_some_and(|word| word.starts_with('-')) {
            words.insert(0, program.to_owned());
        }
        let Some(outcome) = command_line(&words, Some(name), None) else {
            continue;
        };
        let meaning = match outcome {
            Err(problem) => Meaning::Note(problem),
            Ok((mut meaning, more)) => {
                found.json_files.extend(more.json_files);
                if let Meaning::Relays(drafts) = &mut meaning {
                    for draft in drafts {
                        draft.notes.push(
                            "it ran in a container: addresses and files are those inside; see docs/migrating.md".to_owned(),
                        );
                    }
                }
                meaning
            }
        };
        found.entries.push(Entry {
            source: path.display().to_string(),
            line: line_of(text, name),
            text: format!("{name}: {}", words.join(" ")),
            meaning,
        });
    }
    Ok(found)
}

/// A command as compose takes it: a text that is split as a shell would, or a list.
fn words(value: &Yaml) -> Vec<String> {
    match value {
        Yaml::String(line) => shlex::split(line).unwrap_or_default(),
        Yaml::Array(list) => list
            .iter()
            .filter_map(|word| match word {
                Yaml::String(word) => Some(word.clone()),
                Yaml::Integer(number) => Some(number.to_string()),
                _ => None,
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// The line on which a service begins: the library's values have no places.
fn line_of(text: &str, service: &str) -> Option<usize> {
    let begins = |line: &str| {
        let line = line.trim();
        line.strip_prefix(service)
            .is_some_and(|rest| rest.trim_start().starts_with(':'))
    };
    text.lines().position(begins).map(|at| at + 1)
}
