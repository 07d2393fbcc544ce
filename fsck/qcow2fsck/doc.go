// Package qcow2fsck checks and repairs qcow2 images (fsck.Checker "qcow2").
// Section names in comments are those of QEMU's docs/interop/qcow2.txt.
//
// Design note. The walk is tolerant: it shares with layers/qcow2 only what has
// one right answer (widths of counts, compressed descriptors, decompression)
// and trusts no number. It goes
//
//	header -> tables it names -> survey of the L2 tables -> walk -> compare
//
// Structures that the header names (L1, refcount table, snapshots, bitmaps) are
// claimed first, each in turn, so that one that lies upon another is seen. The
// survey reads every L2 table once and drops what an L1 entry calls a table and
// is none; only then are the tables marked as metadata, and the walk can tell
// which entries point into metadata.
//
// References are counted in cells: two bits for a cluster in the usual states,
// 16 or 32 bits for those that need it (see cells.go). An L2 table that many
// snapshots share is walked once, with their number as its weight. When the
// memory of Options.Memory does not hold all cells, the walk is repeated for
// one window of the file after the other. So a clean image costs two readings
// of its L2 tables and one of its refcount blocks, whatever the number of its
// snapshots.
//
// Only when the comparison shows something odd are the L2 tables read again to
// find the entries behind it (detail.go): clusters with several owners, COPIED
// flags, compressed descriptors that reach too far.
//
// What decides between two explanations of the same damage is evidence in the
// image: whether a table looks like one, whether a count agrees. The functions
// that weigh it are in evidence.go.
//
// Repairs write through fsck.Plan. A leak may be what a damaged table pointed
// to, so that with damage in the map leaks are freed only by a full repair and
// their content is kept in lost+found.
package qcow2fsck
