//! The rotations of a model for the rows of a pass: tables of cosines and sines, and which row is turned by which.

use retune_kernels::heads::HeadLayout;
use retune_kernels::rope::{self, Table};

use crate::pass::Pass;
use crate::profile::{Operation, span};
use crate::spec::Rope;

/// Tables of long rows that are kept, where each length has one of its own.
const MOST_LONG: usize = 8;

/// The tables of a spec's rotations.
#[derive(Default)]
pub(crate) struct Rotations {
    ropes: Vec<Rope>,
    /// One for each rotation, for rows of usual length.
    usual: Vec<Table>,
    /// Those of long rows, with the rotation that each is of.
    long: Vec<(usize, Table)>,
}

/// Which way to turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    /// Turns gradients of turned heads into those of the heads before.
    Backward,
}

impl Rotations {
    pub fn new(ropes: &[Rope]) -> Self {
        let usual = ropes.iter().map(|rope| Table::new(rope.frequencies.clone(), rope.factor)).collect();
        Self { ropes: ropes.to_vec(), usual, long: Vec::new() }
    }

    /// Makes the tables of usual rows hold `positions` positions.
    pub fn grow(&mut self, positions: usize) {
        for (rope, table) in self.ropes.iter().zip(&mut self.usual) {
            let most = rope.long.as_ref().map_or(usize::MAX, |long| long.beyond);
            table.grow(positions.min(most));
        }
    }

    /// The table for rows of `length` tokens.
    fn table(&mut self, rope: usize, length: usize) -> &Table {
        let of = &self.ropes[rope];
        if of.long.as_ref().is_none_or(|long| length <= long.beyond) {
            return &self.usual[rope];
        }
        let frequencies = of.frequencies_at(length);
        let same = |table: &Table| table.frequencies() == &*frequencies;
        let at = match self.long.iter().position(|(of, table)| *of == rope && same(table)) {
            Some(at) => at,
            None => {
                if self.long.len() >= MOST_LONG {
                    self.long.remove(0);
                }
                self.long.push((rope, Table::new(frequencies.into_owned(), of.factor)));
                self.long.len() - 1
            }
        };
        let (_, table) = &mut self.long[at];
        table.grow(length);
        table
    }

    /// Turns the heads in the rows `x` of a pass's tokens in place, each by its position in its row.
    pub fn turn(&mut self, rope: usize, x: &mut [f32], layout: HeadLayout, pass: &Pass, direction: Direction) {
        let _span = span(Operation::Rope);
        let turn = match direction {
            Direction::Forward => rope::forward,
            Direction::Backward => rope::backward,
        };
        if self.ropes[rope].long.is_none() {
            return turn(x, layout, &pass.positions, &self.usual[rope]);
        }
        // A row's length decides for all its tokens.
        for sequence in &pass.sequences {
            let tokens = sequence.tokens.clone();
            let positions = &pass.positions[tokens.clone()];
            let length = positions.iter().max().map_or(0, |&last| last as usize + 1);
            let table = self.table(rope, length);
            turn(&mut x[tokens.start * layout.row..tokens.end * layout.row], layout, positions, table);
        }
    }
}
