//! `import …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Write pathways.conf and instances.tsv into the configuration directory, where neither may be yet
    #[arg(long, global = true)]
    pub write: bool,
    /// Remove from the kernel what was made for the old set-up; without this it is listed
    #[arg(long, global = true)]
    pub clean: bool,
    /// What runs today.
    #[command(subcommand)]
    pub source: ImportSource,
}

/// What runs today.
#[derive(Debug, Subcommand)]
pub enum ImportSource {
    /// A command line of go-mmproxy, its forks, mmproxy-rs or cloudflare/mmproxy
    GoMmproxy {
        /// Its flags, with or without the program's name; --write and --clean stand before
        #[arg(
            value_name = "FLAG",
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        words: Vec<String>,
    },
    /// The JSON file of the mmproxy with several routes
    MmproxyJson {
        /// The files
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// systemd units that start any of them
    Units {
        /// Unit files, or directories with some [default: where systemd has them]
        #[arg(value_name = "PATH")]
        paths: Vec<PathBuf>,
    },
    /// Docker compose files with services that start any of them
    Compose {
        /// The files
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// The directory of the shell set-up around go-mmproxy, with config/ in it
    Scripts {
        /// The directory
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}
