//! The driver for nftables: a table of our own, read with `nft -j`, replaced in one `nft -f -` transaction.
//!
//! The kernel is asked whether there is such a table first: on a host without it, nothing is run.

use crate::pathway::piece::Step;

use super::table::{self, Table};
use super::{Driver, Error, program, residue};

/// The binary, where it is installed.
#[derive(Debug)]
pub(crate) struct Nftables(Option<String>);

impl Nftables {
    /// Looks for it.
    pub(crate) fn open() -> Self {
        let path = program::in_path("nft").or_else(|| program::in_sbin("nft"));
        Self(path.map(|path| path.to_string_lossy().into_owned()))
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// [`Error::Missing`]
    pub(crate) fn require(&self) -> Result<&str, Error> {
        self.0.as_deref().ok_or(Error::Missing {
            program: "nft",
            package: "nftables",
        })
    }
}

impl Driver for Nftables {
    /// `None` without a table.
    type Found = Option<Table>;

    async fn read(&self) -> Result<Option<Table>, Error> {
        let exists = residue::own_table_exists().map_err(|source| Error::OwnTable { source })?;
        if !exists {
            return Ok(None);
        }
        let Some(nft) = &self.0 else {
            return Ok(Some(Table::Unreadable));
        };
        let (family, name) = table::NAME;
        match program::run(nft, &["-j", "list", "table", family, name], "").await {
            Ok(json) => match Table::parse(&json) {
                Some(table) => Ok(Some(table)),
                None => Err(Error::Shape {
                    program: nft.clone(),
                }),
            },
            // it went between the question and the listing
            Err(_) if matches!(residue::own_table_exists(), Ok(false)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn write(&self, steps: &[Step]) -> Result<(), Error> {
        let Some(Step::Entries(step)) = steps.first() else {
            return Ok(());
        };
        let input = step.transaction();
        let nft = self.require()?;
        program::run(nft, &["-f", "-"], &input).await.map(|_| ())
    }
}
