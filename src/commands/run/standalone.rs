//! From `run`'s flags to the origin of its relays.

use tracing::warn;

use crate::cli::{Global, RunArgs};
use crate::commands::{UsageError, drawn};
use crate::compat::relay_name;
use crate::config::{self, Origin, Relays, Standalone, Trusted};
use crate::model::{Instance, NamedTargets, Pathway, Protocol, TargetPorts};

/// Where the relays that were asked for come from.
pub(super) fn origin(global: &Global, args: &RunArgs) -> anyhow::Result<Origin> {
    let alone = &args.standalone;
    let relays = match (&alone.listen, &alone.json_config) {
        (Some(listen), _) => {
            let (options, warnings) = config::from_words(&alone.options.words())?;
            if !warnings.is_empty() && !global.quiet {
                eprintln!("{}\n", drawn(&warnings));
            }
            let listen = config::listen_as_told(listen, options.listen)?;
            let name = match (&alone.name, listen.ports()) {
                (Some(name), _) => name.clone(),
                (None, Some(range)) => relay_name(options.protocol, range.first())
                    .map_err(|mistake| UsageError(mistake.to_string()))?,
                (None, None) => {
                    return Err(UsageError("a Unix socket needs --name".to_owned()).into());
                }
            };
            if listen.ports().is_none() && options.protocol == Protocol::Udp {
                let mistake = "a Unix socket carries connections, and --protocol is udp";
                return Err(UsageError(mistake.to_owned()).into());
            }
            if let Some(mark) = alone.mark
                && Pathway::with_defaults(mark).is_none()
            {
                warn!(%mark, "the mark is the number of a system table: its pathway needs table= in pathways.conf");
            }
            Relays::Given(vec![Instance {
                name,
                mark: alone.mark,
                listen,
                target4: alone.target4,
                target6: alone.target6,
                target_ports: TargetPorts::One,
                named: NamedTargets::default(),
                options,
            }])
        }
        (None, Some(file)) => Relays::Json(file.clone()),
        (None, None) => return Ok(Origin::Files(global.config_dir.clone())),
    };
    let trusted = match &alone.allow {
        Some(file) => Trusted::File(file.clone()),
        None if !alone.trust.is_empty() => Trusted::These(alone.trust.clone()),
        None => Trusted::Usual,
    };
    Ok(Origin::Standalone(Standalone {
        relays,
        trusted,
        directory: global.config_dir.clone(),
    }))
}
