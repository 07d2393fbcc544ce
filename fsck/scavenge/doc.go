// Package scavenge rebuilds an image whose map is lost (the BAT of ploop, the
// L1 table or the header of qcow2) from what its content can prove, into a new
// file.
//
// Design note. What survives of such an image comes in pieces: for ploop a
// piece is one data cluster, for qcow2 one L2 table with all it maps (an L2
// table is recognisable, see tables.go). A piece is whole in itself; what was
// lost is its place on the disk. Places are found in rounds:
//
//  1. what still tells places without the guest: surviving entries of the BAT
//     or L1, an L1 table that was found, the L1 tables of internal snapshots,
//     or a disk so small that there is one place only;
//  2. the guest's filesystems. Two passes over the file collect evidence:
//     superblocks and partition tables (tables.go, ext4.go, xfs.go, btrfs.go),
//     and then metadata blocks that say, under a checksum, where in their
//     filesystem they belong. Inodes and directory blocks of ext4 do so by
//     their checksum alone: it is solved for the inode number (crc.go);
//  3. where a filesystem begins on the disk is proven as well (bases.go): by
//     the partition table, by the lengths of disk and filesystem, or by pieces
//     that already have a place.
//
// A piece gets a place only when its evidence agrees (tally.go, place.go). A
// journal holds copies of metadata, a guest may hold images of other disks, and
// stale clusters of earlier times may lie about: their evidence does not fit
// the place that it lies at, or contradicts that of others, and then the piece
// stays unplaced and is reported. Two pieces that have proof for one place are
// a conflict, and neither gets it. Guesses (guess.go) are made only when asked
// for, and are labelled.
//
// The source is only read. Memory follows the number of clusters and the
// amount of evidence, both counted against Options.Memory before it is used;
// time is linear in the length of the file. Everything in the file is hostile:
// a number is used only after it was checked against what it has to fit.
package scavenge
