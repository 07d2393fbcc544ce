// Package fsck finds what is wrong with disk images and mends it so that the
// mending can be taken back.
//
// Design note. A Checker (fsck/qcow2fsck, fsck/ploopfsck) walks the host side
// of one image file with a tolerant reader of its own: it never trusts a
// number and goes on behind whatever it can. It never writes. What it finds it
// reports as Findings; the Sink answers whether the fix of a finding is wanted,
// and the walk then goes on as if it had been done, entering the bytes to be
// changed in a Plan. So check and repair are one walk.
//
// A Plan is a set of byte changes in ordered phases. Until Execute nothing has
// happened; Plan.ReadAt shows the file as it will be, so that a later pass of
// a checker (counting references, say) sees the fixes of an earlier one.
// Execute does, in this order:
//
//  1. what cannot be kept in the image is copied to the lost+found directory
//     and synced;
//  2. the old bytes of everything that will change are written to the undo
//     file and synced, with its directory;
//  3. the phases are done one after the other, with a Sync after each.
//
// A failed sync aborts. Whatever state a crash leaves, ApplyUndo restores the
// image bit for bit with its length, and a new run checks and repairs it
// afresh; see undo.go for the file format.
//
// A Collector is the Sink that the tool uses: it counts per code, exactly,
// keeps details up to a limit, and decides (never, preen, all, ask). Stack
// checks what concerns several files (parents, descriptors, sizes).
//
// Codes are an interface: they are never renamed, and docs/fsck-codes.md, which
// a test keeps up to date, lists all of them.
package fsck
